"""How a reader is asked: settings of its chat template, its anchor and its BOS tokens."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date as Date
from typing import Literal

from latentwire_fast.config.base import Settings, require

# Templates that print today's date (Llama 3.1, SmolLM3) are given this one, so that a prompt is the
# same on every day. It is what Llama 3.1's own template says where it knows no date.
FIXED_DATE = "2024-07-26"


@dataclass(frozen=True, kw_only=True)
class TemplateConfig(Settings):
    """Which chat template of a tokenizer is used, and what it is told.

    Attributes:
        template: the name of one of several chat templates; None takes the tokenizer's default.
        date: `YYYY-MM-DD`, in the place of today's in a chat template that asks for it.
    """

    template: str | None = None
    date: str = FIXED_DATE

    def __post_init__(self) -> None:
        super().__post_init__()
        check_date(self.date)


@dataclass(frozen=True, kw_only=True)
class PromptConfig(TemplateConfig):
    """How a prompt is built for one reader.

    Attributes:
        anchor: what asks for the answer. `text`: the words of `anchor_text`, behind the chat
            template's header of the assistant where there is one. `chat`: that header alone.
            `none`: nothing, the answer follows the user's text.
        anchor_text: must not end in white space.
        bos: put the tokenizer's BOS first when the template does not; None: only without a
            template.
        append_bos_after_prefix: put the tokenizer's BOS behind the latent too, where the reader's
            own text begins.
    """

    anchor: Literal["text", "chat", "none"] = "text"
    anchor_text: str = "Answer:"
    bos: bool | None = None
    append_bos_after_prefix: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.anchor_text == self.anchor_text.rstrip(),
            f"anchor_text {self.anchor_text!r} ends in white space, which would change the first "
            "answer token; end it at its last visible character",
        )
        require(
            bool(self.anchor_text) or self.anchor != "text",
            "anchor_text is empty; write what asks for the answer, or set anchor to none or chat",
        )


def check_date(value: str) -> None:
    """Raise unless this is a date.

    Raises:
        ConfigError: it is none.
    """
    try:
        is_date = Date.fromisoformat(value).isoformat() == value
    except ValueError:
        is_date = False
    require(is_date, f"date={value!r}, expected a date such as {FIXED_DATE!r}")
