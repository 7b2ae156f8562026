"""What a latent is compared with: for every method, what a receiver is given.

Every method goes through the same prompt builder and the same receiver. A method is a list of
prompts (one per example) and, where something other than token ids is read, of payloads or of
embeddings `[M_i, D]`. Budgets count *content* positions: template and anchor are the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentwire_fast.data.examples import Example
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.prompts.builder import Prompt, Turn, context_text, full_text, question_text
from latentwire_fast.readers.reader import Reader

FIRST_WORDS = 5


@dataclass
class MethodInput:
    """A method's input for some examples.

    Attributes:
        prompts: with the gold answer as targets.
        positions: per example, how many positions the latent (or the text in its place) takes.
        payloads, embeddings: what stands in the prompts, one per example. Neither: text.
    """

    prompts: list[Prompt]
    positions: list[int]
    payloads: list[bytes] | None = None
    embeddings: list[Tensor] | None = None

    def reader_inputs(self, rows: range) -> dict[str, Any]:
        """What `Receiver.generate` and `score` take beside the prompts of some examples."""
        return {
            "payloads": None if self.payloads is None else [self.payloads[i] for i in rows],
            "embeddings": None if self.embeddings is None else [self.embeddings[i] for i in rows],
        }


def cut_utf8(text: str, size: int) -> str:
    """The longest prefix of a text whose UTF-8 form has at most `size` bytes."""
    return text.encode()[: max(0, size)].decode(errors="ignore")


def other_contexts(examples: Sequence[Example]) -> list[int]:
    """Per example, the next one (cyclic) with another context; itself where all contexts are equal.

    Data sets ask several questions of one passage: a mere neighbour's latent may stand for the same
    text.
    """
    count = len(examples)

    def partner(i: int) -> int:
        following = ((i + step) % count for step in range(1, count))
        return next((j for j in following if examples[j].context != examples[i].context), i)

    return [partner(i) for i in range(count)]


class Methods:
    """Builds every method's input for one reader.

    Args:
        model: the trained interlingua; its mode says what the latent stands for.
        payloads: one per example, at the run's bit width.
    """

    def __init__(
        self,
        model: Interlingua,
        reader: Reader,
        examples: Sequence[Example],
        *,
        payloads: Sequence[bytes],
    ) -> None:
        self.model = model
        self.reader = reader
        self.examples = list(examples)
        self.payloads = list(payloads)
        self.budget = model.positions
        # In context mode the label stands beside the latent: it is free for every method.
        self.label = len(reader.prompts.label_ids) if model.mode == "context" else 0
        self.table: dict[str, Callable[[], MethodInput]] = {
            "text": self.text,
            "latent": lambda: self.latent(self.payloads),
            "token_budget": self.token_budget,
            "token_budget_question": self.token_budget_question,
            "byte_budget": self.byte_budget,
            "closed_book": self.closed_book,
            "shuffled_latent": lambda: self.latent(
                [self.payloads[i] for i in other_contexts(self.examples)]
            ),
            "zero_latent": lambda: self.latent(self._zeros()),
            "embedding_replay": self.embedding_replay,
        }

    def _turn(self, example: Example) -> list[Turn]:
        return [Turn(example.question, example.answers[0])]

    def _text_like(self, user_ids: Sequence[list[int] | None]) -> MethodInput:
        """Text prompts whose user part is the given ids (None: the whole text)."""
        prompts = [
            self.reader.prompts.build(self._turn(e), context=e.context, user_ids=ids)
            for e, ids in zip(self.examples, user_ids, strict=True)
        ]
        return MethodInput(prompts, [self._positions(p, e) for p, e in self._zip(prompts)])

    def _zip(self, prompts: list[Prompt]) -> list[tuple[Prompt, Example]]:
        return list(zip(prompts, self.examples, strict=True))

    def _positions(self, prompt: Prompt, example: Example) -> int:
        """Content positions in the latent's place: in context mode its label and the question are
        not among them."""
        if self.model.mode == "pure":
            return prompt.content
        question = self.reader.prompts.text_ids(question_text(example.question))
        return max(0, prompt.content - len(question) - self.label)

    def text(self) -> MethodInput:
        """The whole prompt."""
        return self._text_like([None] * len(self.examples))

    def latent(self, payloads: Sequence[bytes]) -> MethodInput:
        """These payloads in the latent's place."""
        prompts = [
            self.reader.prompts.build(self._turn(e), context=e.context, latent=self.model.mode)
            for e in self.examples
        ]
        return MethodInput(prompts, [self.budget] * len(prompts), payloads=list(payloads))

    def _zeros(self) -> list[bytes]:
        """Payloads of latents that are zero."""
        encoder = self.model.encoder_config
        return self.model.payloads(torch.zeros(len(self.examples), encoder.latents, encoder.d_z))

    def token_budget(self) -> MethodInput:
        """The prompt cut to M tokens from its start, as the seeds do: the question is usually
        lost."""
        ids = self.reader.prompts.text_ids
        given = self._text_like(
            [ids(full_text(e.context, e.question))[: self.budget] for e in self.examples]
        )
        # The cut runs over context and question alike, so in either mode all of it counts.
        given.positions = [prompt.content for prompt in given.prompts]
        return given

    def token_budget_question(self) -> MethodInput:
        """The question kept and the context cut: to M less the question (pure), or to M
        (context)."""
        cut = []
        for e in self.examples:
            question = self.reader.prompts.text_ids(question_text(e.question))
            left = self.budget - (len(question) if self.model.mode == "pure" else 0)
            context = self.reader.prompts.text_ids(context_text(e.context))
            context = context[: self.label + max(0, left)]
            cut.append([*context, *question])
        return self._text_like(cut)

    def byte_budget(self, sizes: Sequence[int] | None = None) -> MethodInput:
        """The text cut to the payload's bytes (or to `sizes`): the whole prompt (pure), or the
        context (context)."""
        cut = []
        for e, size in zip(self.examples, sizes or map(len, self.payloads), strict=True):
            if self.model.mode == "pure":
                text = cut_utf8(full_text(e.context, e.question), size)
            else:  # the label and the question are free
                text = full_text(cut_utf8(e.context, size), e.question)
            cut.append(self.reader.prompts.text_ids(text))
        return self._text_like(cut)

    def closed_book(self) -> MethodInput:
        """The question alone."""
        prompts = [self.reader.prompts.build(self._turn(e), context=None) for e in self.examples]
        return MethodInput(prompts, [self._positions(p, e) for p, e in self._zip(prompts)])

    def embedding_replay(self) -> MethodInput:
        """The text's own input embeddings as the prefix: must equal text."""
        text = self.text()
        prompts, embeddings = [], []
        for prompt in text.prompts:
            start = self.reader.prompts.content_start
            stop = start + prompt.content
            replay = Prompt(
                ids=prompt.ids[:start] + prompt.ids[stop:],
                latent_at=start,
                is_target=prompt.is_target[:start] + prompt.is_target[stop:],
            )
            ids = torch.tensor(prompt.ids[start:stop], device=self.reader.device)
            prompts.append(replay)
            embeddings.append(self.reader.embedding(ids))
        return MethodInput(prompts, text.positions, embeddings=embeddings)

    def first_words(self) -> list[str]:
        """A floor without a model: the first words of the context as the answer."""
        return [" ".join(e.context.split()[:FIRST_WORDS]) for e in self.examples]


def unanswered(prompt: Prompt) -> Prompt:
    """A one-turn prompt without its answer: what decoding starts from."""
    end = prompt.is_target.index(True) if any(prompt.is_target) else len(prompt.ids)
    return Prompt(prompt.ids[:end], prompt.latent_at, prompt.is_target[:end], prompt.content)
