"""The one prompt builder, for training, evaluation and generation alike.

A prompt is one or more turns. The user's part holds the context and the question, the assistant's
part starts with the *anchor* (`Answer:`), and the answer carries its own leading space: an anchor
that ends in a space breaks the tokenisation of the first answer token. Chat templates come from the
tokenizer (`apply_chat_template`), rendered once and cut into their fixed pieces; what a user wrote
is tokenised apart from them, so a text that spells a control token stays text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import get_args

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from latentwire_fast.config.schema import Mode
from latentwire_fast.errors import ConfigError

ANCHOR = "Answer:"
CONTEXT_LABEL = "Context:"
_USER, _ASSISTANT, _NEXT_USER = "LWUSERTEXT", "LWASSISTANTTEXT", "LWNEXTUSERTEXT"


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


def _user_text(question: str, context: str | None, latent: Mode | None) -> str:
    """The text of a first turn's user part; a latent stands for the rest, in pure mode for all."""
    if latent == "pure":
        return ""
    if latent == "context" or context is None:
        return question_text(question)
    return full_text(context, question)


class PromptBuilder:
    """Builds prompts for one tokenizer.

    Args:
        tokenizer: a fast Hugging Face tokenizer with an EOS token; its chat template is used if it
            has one.
        anchor: literal text that asks for the answer; must not end in white space.
        bos: put the tokenizer's BOS first when the template does not (`None`: only without a
            template).

    Raises:
        ConfigError: the anchor ends in white space, or the tokenizer has no EOS.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        anchor: str = ANCHOR,
        bos: bool | None = None,
    ) -> None:
        if anchor != anchor.rstrip():
            raise ConfigError(
                f"anchor {anchor!r} ends in white space, which would change the first answer "
                "token; end it at its last visible character"
            )
        if tokenizer.eos_token_id is None:
            raise ConfigError(f"tokenizer {tokenizer.name_or_path!r} has no EOS token; set one")
        self.tokenizer = tokenizer
        self.anchor = anchor
        self.eos_id = int(tokenizer.eos_token_id)
        opening, to_assistant, to_user = self._template_pieces()
        has_template = bool(getattr(tokenizer, "chat_template", None))
        self._opening = self._control_ids(opening)
        wants_bos = (not has_template) if bos is None else bos
        bos_id = tokenizer.bos_token_id
        if bos is False and bos_id is not None and self._opening[:1] == [bos_id]:
            self._opening = self._opening[1:]
        elif wants_bos and bos_id is not None and self._opening[:1] != [bos_id]:
            self._opening = [bos_id, *self._opening]
        self._to_assistant = self._control_ids(to_assistant)
        eos = tokenizer.eos_token
        self._to_user = self._control_ids(to_user.removeprefix(eos) if eos else to_user)
        self.anchor_ids = self.text_ids(anchor)
        self.label_ids = self.text_ids(CONTEXT_LABEL)

    @property
    def content_start(self) -> int:
        """Index of the first content id in a text prompt."""
        return len(self._opening)

    def _template_pieces(self) -> tuple[str, str, str]:
        """The template's text before the user, between user and assistant, and before the next
        user."""
        tokenizer = self.tokenizer
        if not getattr(tokenizer, "chat_template", None):
            return "", "\n", ""
        messages = [
            {"role": "user", "content": _USER},
            {"role": "assistant", "content": _ASSISTANT},
            {"role": "user", "content": _NEXT_USER},
        ]
        try:
            text = str(tokenizer.apply_chat_template(messages, tokenize=False))
            first = str(
                tokenizer.apply_chat_template(
                    messages[:1], tokenize=False, add_generation_prompt=True
                )
            )
        except TemplateError as error:
            raise ConfigError(
                f"the chat template of {tokenizer.name_or_path!r} fails: {error}"
            ) from None
        try:
            opening, to_assistant = first.split(_USER)
            to_user = text.split(_ASSISTANT)[1].split(_NEXT_USER)[0]
        except (ValueError, IndexError):
            raise ConfigError(
                f"the chat template of {tokenizer.name_or_path!r} rewrites its messages, so the "
                "places of user and assistant text cannot be found"
            ) from None
        return opening, to_assistant, to_user

    def _control_ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def text_ids(self, text: str) -> list[int]:
        """Token ids of user text; control tokens spelled in it stay plain text."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)[
            "input_ids"
        ]

    def text_ids_of_many(self, texts: Sequence[str]) -> list[list[int]]:
        """`text_ids` of each text, tokenised together."""
        encoded = self.tokenizer([*texts], add_special_tokens=False, split_special_tokens=True)
        return encoded["input_ids"]

    def text_ends(self, text: str) -> list[int]:
        """Index of the character behind each token of `text_ids(text)`."""
        spans = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
        )["offset_mapping"]
        return [end for _, end in spans]

    def answer_ids(self, answer: str) -> list[int]:
        """Token ids of an answer after the anchor (its leading space included), without EOS."""
        return self.text_ids(" " + answer)

    def target_ids(self, answer: str) -> list[int]:
        """Answer ids plus EOS: the targets of the cross-entropy."""
        return [*self.answer_ids(answer), self.eos_id]

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
            text = _user_text(turns[0].question, context, latent)
            first = self.text_ids(text) if text else []
        else:
            first, latent = [*user_ids], None
        rest = [self.text_ids(question_text(turn.question)) for turn in turns[1:]]
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
            _user_text(turn.question, passage, latent)
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
        prompt.add(self._opening)
        for number, (turn, user_ids) in enumerate(zip(turns, users, strict=True)):
            if number:
                prompt.add(self._to_user)
            elif latent is not None:
                prompt.add(self.label_ids if latent == "context" else [])
                prompt.latent_at = len(prompt.ids)
            prompt.add(user_ids, content=True)
            prompt.add(self._to_assistant)
            prompt.add(self.anchor_ids)
            if turn.answer is not None:
                prompt.add(self.target_ids(turn.answer), target=True)
        return prompt

    def build_context(self, context: str, *, max_tokens: int | None = None) -> Prompt:
        """The opening and the context alone: what an LM encoder reads in context mode."""
        prompt = Prompt()
        prompt.add(self._opening)
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

    def build_rebuild(self, target: str) -> Prompt:
        """The context's place taken by a latent, then `target` itself as what is to be written.

        The pretraining tasks: `target` is the encoded text (autoencoding) or what follows it
        (continuation); which of them is meant, the task token at the prefix's end says.
        """
        prompt = Prompt()
        prompt.add(self._opening)
        prompt.add(self.label_ids)
        prompt.latent_at = len(prompt.ids)
        prompt.add(self.target_ids(target), target=True)
        return prompt

    def check_alignment(self, answers: Sequence[str]) -> list[str]:
        """The answers whose first token would change when tokenised together with the anchor.

        An empty list means that prompt ids + answer ids are what the joined text tokenises to.
        """
        joined = self.tokenizer(
            [f"{self.anchor} {a}" for a in answers],
            add_special_tokens=False,
            split_special_tokens=True,
        )
        return [
            answer
            for answer, ids in zip(answers, joined["input_ids"], strict=True)
            if ids != [*self.anchor_ids, *self.answer_ids(answer)]
        ]
