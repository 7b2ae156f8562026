"""A chat template, cut into its fixed pieces.

A template is a program that turns messages into one text. Here it is run on messages that are
markers; what stands between the markers is the same for all messages. Whatever it is told besides
is fixed: a date that is not today's, and no thinking before the answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from transformers import PreTrainedTokenizerBase

from latentwire_fast.config.prompt import TemplateConfig
from latentwire_fast.errors import ConfigError

_USER, _ASSISTANT, _NEXT_USER = "LWUSERTEXT", "LWASSISTANTTEXT", "LWNEXTUSERTEXT"
_SYSTEM = "You are a helpful assistant."  # for templates that insist on a first system message
_THINKING = re.compile(r"<(think|thinking|reason|reasoning)>")

Messages = Sequence[dict[str, str]]


@dataclass(frozen=True)
class TemplatePieces:
    """The fixed pieces of a conversation.

    Attributes:
        opening: before the first user's text.
        to_assistant: between a user's text and an answer.
        closing: behind an answer that is the last message.
        to_user: between an answer and the next user's text.
        is_chat: whether they come from a chat template.
        trims: whether the template takes white space off the ends of a user's text.
    """

    opening: str = ""
    to_assistant: str = "\n"
    closing: str = ""
    to_user: str = ""
    is_chat: bool = False
    trims: bool = False


def template_pieces(tokenizer: PreTrainedTokenizerBase, config: TemplateConfig) -> TemplatePieces:
    """The pieces of a tokenizer's chat template, or those of plain text where it has none.

    Raises:
        ConfigError: no template of that name, or one that cannot be used.
    """
    name = _template_name(tokenizer, config)
    if not tokenizer.chat_template:
        return TemplatePieces()
    return _ChatTemplate(tokenizer, name, config).pieces()


def _template_name(tokenizer: PreTrainedTokenizerBase, config: TemplateConfig) -> str | None:
    """The name to give to the tokenizer; None for its only template, or its default.

    Raises:
        ConfigError: there is none of that name, or several and none is the default.
    """
    templates = tokenizer.chat_template
    names = sorted(templates) if isinstance(templates, dict) else []
    wanted, who = config.template, f"tokenizer {tokenizer.name_or_path!r}"
    if wanted is not None and wanted not in names:
        there = f"its templates are {names}" if names else "it has no named templates"
        raise ConfigError(
            f"template={wanted!r}: {who} has no chat template of that name ({there}); "
            + ("name one of them" if names else "leave `template` out")
        )
    if wanted is None and names and "default" not in names:
        raise ConfigError(
            f"{who} has several chat templates and no default; set `template` to one of {names}"
        )
    return wanted


class _ChatTemplate:
    """One chat template, run on markers."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, name: str | None, config: TemplateConfig
    ) -> None:
        self._tokenizer = tokenizer
        day = datetime.fromisoformat(config.date)
        template = tokenizer.chat_template
        if isinstance(template, dict):
            template = template[name or "default"]
        self._options: dict[str, Any] = {
            "chat_template": _fixed_clock(str(template), day),
            "tokenize": False,
            "date_string": day.strftime("%d %b %Y"),  # some take it in the place of the clock's
            # What templates of models that think call the switch.
            "enable_thinking": False,
            "thinking": False,
        }
        self._system: list[dict[str, str]] = []

    def pieces(self) -> TemplatePieces:
        """Everything between the markers.

        Raises:
            ConfigError: the template fails, or the markers are not where they should be.
        """
        user = {"role": "user", "content": _USER}
        assistant = {"role": "assistant", "content": _ASSISTANT}
        asked = self._first([user])
        opening, header = self._between(asked, _USER)
        whole = self._run([user, assistant, {"role": "user", "content": _NEXT_USER}])
        _, between, to_user, _ = self._between(whole, _USER, _ASSISTANT, _NEXT_USER)
        try:
            answered = self._run([user, assistant])
        except ConfigError:  # some insist that the user speaks last
            closing = to_user
        else:
            _, _, closing = self._between(answered, _USER, _ASSISTANT)
        spaced = self._run([{"role": "user", "content": f" \n{_USER}"}], generation=True)
        if self._first([user]) != asked:
            raise self._refusal("gives another text each time that it is used")
        return TemplatePieces(
            opening=opening,
            to_assistant=_without_thinking(_header(header, between)),
            closing=closing,
            to_user=to_user,
            is_chat=True,
            trims=spaced == asked,
        )

    def _first(self, messages: Messages) -> str:
        """The text up to where an answer begins; with a system message if it fails without."""
        try:
            return self._run(messages, generation=True)
        except ConfigError:
            if self._system:
                raise
            self._system = [{"role": "system", "content": _SYSTEM}]
            try:
                return self._run(messages, generation=True)
            except ConfigError:
                self._system = []
            raise

    def _run(self, messages: Messages, *, generation: bool = False) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                [*self._system, *messages], add_generation_prompt=generation, **self._options
            )
        except Exception as error:  # a template is a program: it fails in all kinds of ways
            reason = " ".join(str(error).split()) or type(error).__name__
            raise self._refusal(f"fails: {reason}") from None
        return str(text)

    def _between(self, text: str, *markers: str) -> list[str]:
        """What stands before, between and behind markers, each of which is there once."""
        pieces = []
        for marker in markers:
            piece, found, text = text.partition(marker)
            if not found or marker in text:
                raise self._refusal(
                    "rewrites its messages (it merges, repeats, drops or changes them), so the "
                    "places of user and assistant text cannot be found"
                )
            pieces.append(piece)
        return [*pieces, text]

    def _refusal(self, what: str) -> ConfigError:
        return ConfigError(
            f"the chat template of {self._tokenizer.name_or_path!r} {what}; give the tokenizer "
            "another template, or remove it (chat_template in its folder) for plain text"
        )


def _fixed_clock(template: str, day: datetime) -> str:
    """A template in which `strftime_now`, by which templates ask for the time, always says the
    same.

    It is a macro, since transformers lets no function of ours into a template. The line break at
    its end is not part of any text: one behind a tag is left out.
    """
    if "strftime_now" not in template:
        return template
    known = {f"%{flag}": day.strftime(f"%{flag}") for flag in "aAbBcdGHIjmMpSuUVwWxXyYf"}
    known |= {f"%-{flag}": day.strftime(f"%{flag}").lstrip("0") or "0" for flag in "dHIjmMSy"}
    filters = "".join(f" | replace({flag!r}, {value!r})" for flag, value in known.items())
    macro = f"{{% macro strftime_now(format) %}}{{{{ format{filters} }}}}{{% endmacro %}}\n"
    return macro + template


def _header(asked: str, answered: str) -> str:
    """What stands between a user's text and an answer.

    Args:
        asked: behind a user's text where an answer is to be generated.
        answered: between a user's text and an answer that is there. It holds more where a template
            has no generation prompt, or one that leaves a part to the model.
    """
    rest = answered.removeprefix(asked)
    return answered.rstrip(" ") if answered.startswith(asked) and rest.strip() else asked


def _without_thinking(header: str) -> str:
    """A header whose last thinking block is closed: the answer is to come now."""
    opened = _THINKING.findall(header)
    if opened and f"</{opened[-1]}>" not in header.rpartition(f"<{opened[-1]}>")[2]:
        return f"{header.rstrip()}\n\n</{opened[-1]}>\n\n"
    return header
