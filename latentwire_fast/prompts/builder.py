"""The one prompt builder, for training, evaluation and generation alike.

A prompt is one or more turns. The user's part holds the context and the question, the assistant's
part starts with the *anchor* (`Answer:`), and the answer carries its own leading space: an anchor
that ends in a space breaks the tokenisation of the first answer token. An answer ends with the
token that ends the assistant's turn in the chat template, or else with the tokenizer's EOS. Chat
templates are cut into their fixed pieces (`template.py`, `template_ids.py`); what a user wrote is
tokenised apart from them (`text_tokens.py`), so a text that spells a control token stays text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import get_args

from transformers import PreTrainedTokenizerBase

from latentwire_fast.config.prompt import PromptConfig
from latentwire_fast.config.schema import Mode
from latentwire_fast.errors import ConfigError
from latentwire_fast.prompts.template_ids import TemplateIds
from latentwire_fast.prompts.text_tokens import TextTokenizer, control_ids

ANCHOR = PromptConfig().anchor_text
CONTEXT_LABEL = "Context:"


@dataclass(frozen=True)
class Turn:
    """One question on the context, with its answer when it is known."""

    question: str
    answer: str | None = None


@dataclass
class Prompt:
    """Token ids of one receiver input.

    Attributes:
        ids: the token ids, without any placeholder.
        latent_at: the latent prefix stands before `ids[latent_at]`; None for a text prompt.
        is_target: per id, whether it is an answer token or its EOS (what cross-entropy is taken
            over).
        content: how many ids stand for user text (context, question); the rest is template and
            anchor.
    """

    ids: list[int] = field(default_factory=list)
    latent_at: int | None = None
    is_target: list[bool] = field(default_factory=list)
    content: int = 0

    def add(self, ids: Sequence[int], *, target: bool = False, content: bool = False) -> None:
        """Append ids."""
        self.ids.extend(ids)
        self.is_target.extend([target] * len(ids))
        self.content += len(ids) if content else 0

    def behind(self, head: int) -> Prompt:
        """This latent prompt without its first `head` ids, which a deep prefix holds already.

        Raises:
            ConfigError: the latent's place is elsewhere than behind those.
        """
        if not head:
            return self
        if self.latent_at != head:
            raise ConfigError(
                f"the latent of a prompt stands behind {self.latent_at} of its tokens, the deep "
                f"prefix was trained to stand behind {head}; build the prompt with `latent=` the "
                "model's mode, and with the reader that it was trained for"
            )
        return Prompt(self.ids[head:], 0, self.is_target[head:], self.content)


def context_text(context: str) -> str:
    """The context as a reader sees it and as a context-only encoder reads it."""
    return f"{CONTEXT_LABEL} {context}"


def question_text(question: str) -> str:
    """The question as a reader sees it after the context or after a latent."""
    return f"\nQuestion: {question}"


def full_text(context: str, question: str) -> str:
    """The user part of a text prompt; a latent of pure mode stands for all of it."""
    return context_text(context) + question_text(question)


def encoded_text(context: str, question: str | None) -> str:
    """The text that an encoder reads: the context, with the question in pure mode."""
    return context_text(context) if question is None else full_text(context, question)


def replaced_text(context: str, question: str, *, mode: Mode) -> str:
    """The text that a payload replaces: in context mode without its label, which stays."""
    return full_text(context, question) if mode == "pure" else context


def _check_mode(latent: Mode | None) -> None:
    if latent is not None and latent not in get_args(Mode):
        raise ConfigError(f"latent={latent!r}, expected one of {get_args(Mode)}, or None for text")


class PromptBuilder:
    """Builds prompts for one tokenizer.

    Attributes:
        anchor: the words that ask for the answer; empty where the configuration wants none.
        eos_id: the token that ends an answer.

    Args:
        tokenizer: a fast Hugging Face tokenizer with an EOS token; its chat template is used if it
            has one.
        config: see there.

    Raises:
        ConfigError: the tokenizer has not what the configuration asks for, no EOS, or a chat
            template that cannot be used.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, config: PromptConfig | None = None
    ) -> None:
        self.config = config = config or PromptConfig()
        if tokenizer.eos_token_id is None:
            raise ConfigError(f"tokenizer {tokenizer.name_or_path!r} has no EOS token; set one")
        self.tokenizer = tokenizer
        self._text = TextTokenizer(tokenizer)
        self._template = TemplateIds.of(tokenizer, self._text, config)
        self.eos_id = self._template.end
        self.anchor = config.anchor_text if config.anchor == "text" else ""
        self.anchor_ids = self.text_ids(self.anchor) if self.anchor else []
        self.label_ids = self.text_ids(CONTEXT_LABEL)

    @property
    def content_start(self) -> int:
        """Index of the first content id in a text prompt."""
        return len(self._template.opening)

    @property
    def after_prefix_ids(self) -> list[int]:
        """The fixed ids right behind a latent: none, or the BOS token where it is asked for."""
        return self._template.after_prefix

    @property
    def control_ids_used(self) -> set[int]:
        """Every id that prompts have besides those of texts."""
        fixed = self._template
        return {*fixed.opening, *fixed.to_assistant, *fixed.to_user, fixed.end}

    def text_ids(self, text: str) -> list[int]:
        """Token ids of user text; control tokens spelled in it stay plain text."""
        return self._text.ids(text)

    def template_ids(self, text: str) -> list[int]:
        """Token ids of a text whose control tokens are meant, as those of a chat template are."""
        return self._text.template_ids(text)

    def text_ids_of_many(self, texts: Sequence[str]) -> list[list[int]]:
        """`text_ids` of each text, tokenised together."""
        return self._text.ids_of_many(texts)

    def text_ends(self, text: str) -> list[int]:
        """Index of the character behind each token of `text_ids(text)`."""
        return self._text.ends(text)

    def _turn_text(self, text: str) -> str:
        """A user's text as the template would show it: some take white space off its start."""
        return text.lstrip() if self._template.trims else text

    def _first_text(self, question: str, context: str | None, latent: Mode | None) -> str:
        """The text of a first turn's user part; a latent stands for the rest, in pure mode for
        all."""
        if latent is not None:
            return question_text(question) if latent == "context" else ""
        if context is None:
            return self._turn_text(question_text(question))
        return full_text(context, question)

    def answer_ids(self, answer: str) -> list[int]:
        """Token ids of an answer after the anchor, without EOS.

        They begin with a space, unless the answer begins the assistant's turn.
        """
        return self.text_ids(self._answer_text(answer))

    def target_ids(self, answer: str) -> list[int]:
        """Answer ids plus EOS: the targets of the cross-entropy."""
        return [*self.answer_ids(answer), self.eos_id]

    def _answer_text(self, answer: str) -> str:
        return answer if self.config.anchor == "chat" else f" {answer}"

    def build(
        self,
        turns: Sequence[Turn],
        *,
        context: str | None,
        latent: Mode | None = None,
        user_ids: Sequence[int] | None = None,
    ) -> Prompt:
        """The receiver's input for one or more turns.

        Args:
            turns: at least one; every turn but the last needs an answer. An answer becomes targets.
            context: the passage; None for closed book.
            latent: None for a text prompt; `context` puts the latent in the context's place and
                keeps the question as text; `pure` puts it in the place of the whole user text.
            user_ids: replaces the first turn's user text by these ids (truncated baselines).

        Raises:
            ConfigError: no turns, or a mode that there is not.
        """
        if not turns:
            raise ConfigError("no turns to build a prompt of; give at least one")
        _check_mode(latent)
        if user_ids is None:
            text = self._first_text(turns[0].question, context, latent)
            first = self.text_ids(text) if text else []
        else:
            first, latent = [*user_ids], None
        rest = self.text_ids_of_many(
            [self._turn_text(question_text(turn.question)) for turn in turns[1:]]
        )
        return self._assemble(turns, [first, *rest], latent)

    def build_many(
        self,
        turns: Sequence[Turn],
        *,
        contexts: Sequence[str | None] | None = None,
        latent: Mode | None = None,
    ) -> list[Prompt]:
        """One prompt of one turn for each of `turns`; equal to `build` one by one, and faster.

        Their user texts are tokenised together: one by one, a batch of 32 takes milliseconds.

        Args:
            contexts: one per turn; not needed for closed book or where a latent stands for them.
            latent: as in `build`.

        Raises:
            ConfigError: a mode that there is not.
        """
        _check_mode(latent)
        passages = [None] * len(turns) if contexts is None else contexts
        texts = [
            self._first_text(turn.question, passage, latent)
            for turn, passage in zip(turns, passages, strict=True)
        ]
        users = self.text_ids_of_many(texts) if any(texts) else [[] for _ in texts]
        return [
            self._assemble([turn], [ids], latent) for turn, ids in zip(turns, users, strict=True)
        ]

    def _assemble(
        self, turns: Sequence[Turn], users: Sequence[Sequence[int]], latent: Mode | None
    ) -> Prompt:
        """The template's pieces around the user ids of each turn; a latent is in the first."""
        prompt = Prompt()
        prompt.add(self._template.opening)
        for number, (turn, user_ids) in enumerate(zip(turns, users, strict=True)):
            if number:
                prompt.add(self._template.to_user)
            elif latent is not None:
                prompt.add(self.label_ids if latent == "context" else [])
                prompt.latent_at = len(prompt.ids)
                prompt.add(self._template.after_prefix)
            prompt.add(user_ids, content=True)
            prompt.add(self._template.to_assistant)
            prompt.add(self.anchor_ids)
            if turn.answer is not None:
                prompt.add(self.target_ids(turn.answer), target=True)
        return prompt

    def build_hybrid(self, turns: Sequence[Turn], *, text: str, text_first: bool = True) -> Prompt:
        """A prompt with a latent in the place of a part of the context, and the other part as text.

        Args:
            text: the part that is text; it may be empty.
            text_first: whether it stands before the latent, or behind it.
        """
        prompt = self.build(turns, context=None, latent="context")
        assert prompt.latent_at is not None
        ids = self.text_ids(context_text(text))[len(self.label_ids) :] if text else []
        at = prompt.latent_at + (0 if text_first else len(self._template.after_prefix))
        prompt.ids[at:at] = ids
        prompt.is_target[at:at] = [False] * len(ids)
        prompt.content += len(ids)
        if text_first:
            prompt.latent_at += len(ids)
        return prompt

    def build_context(self, context: str, *, max_tokens: int | None = None) -> Prompt:
        """The opening and the context alone: what an LM encoder reads in context mode."""
        prompt = Prompt()
        prompt.add(self._template.opening)
        prompt.add(self.text_ids(context_text(context))[:max_tokens], content=True)
        return prompt

    def build_again(
        self, turns: Sequence[Turn], *, context: str, tokens: int, rng: Random
    ) -> Prompt:
        """A text prompt, and behind it a part of the context a second time.

        Args:
            tokens: how many of the context's tokens are repeated, at most; `rng` chooses which.

        Returns:
            A prompt whose `content` counts the context's ids without their label: they stand behind
            the opening and the label.
        """
        prompt = self.build(turns, context=context)
        context_ids = self.text_ids(context_text(context))[len(self.label_ids) :]
        prompt.content = len(context_ids)
        first = rng.randint(0, max(0, len(context_ids) - tokens))
        prompt.add([*self.text_ids("\n"), *context_ids[first : first + tokens]])
        return prompt

    def build_continued(self, first: str, rest: str) -> Prompt:
        """A text, and what follows it. `content` counts as in `build_again`."""
        prompt = self.build_context(first)
        prompt.content -= len(self.label_ids)
        prompt.add(self.text_ids(f" {rest}"))
        return prompt

    def build_rebuild(self, target: str) -> Prompt:
        """The context's place taken by a latent, then `target` itself as what is to be written.

        The pretraining tasks: `target` is the encoded text (autoencoding) or what follows it
        (continuation); which of them is meant, the task token at the prefix's end says.
        """
        prompt = Prompt()
        prompt.add(self._template.opening)
        prompt.add(self.label_ids)
        prompt.latent_at = len(prompt.ids)
        prompt.add(self._template.after_prefix)
        prompt.add([*self.text_ids(f" {target}"), self.eos_id], target=True)
        return prompt

    def check_alignment(self, answers: Sequence[str]) -> list[str]:
        """The answers whose first token would change when tokenised together with what is before.

        An empty list means that prompt ids + answer ids are what the joined text tokenises to.
        """
        before = self.before_answer
        own = self.text_ids(before)
        texts = [self._answer_text(answer) for answer in answers]
        joined = self.text_ids_of_many([before + text for text in texts])
        alone = self.text_ids_of_many(texts)
        return [
            answer
            for answer, whole, ids in zip(answers, joined, alone, strict=True)
            if whole != [*own, *ids]
        ]

    @property
    def before_answer(self) -> str:
        """The plain text that stands before an answer: the anchor, or else what is behind the last
        control token of the template's header, or a question."""
        if self.config.anchor == "text":
            return self.anchor
        if self.config.anchor == "none":
            return question_text("Who?")
        header, controls = self._template.to_assistant, control_ids(self.tokenizer)
        behind = [place for place, token in enumerate(header) if token in controls]
        return str(self.tokenizer.decode(header[behind[-1] + 1 :] if behind else header))
