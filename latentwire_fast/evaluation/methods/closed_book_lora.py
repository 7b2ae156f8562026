"""The question without any context, read with the reader's low-rank updates (LoRA)."""

from __future__ import annotations

from dataclasses import dataclass

from latentwire_fast.evaluation.methods.base import MethodConfig
from latentwire_fast.evaluation.methods.closed_book import ClosedBook


class ClosedBookLora(ClosedBook):
    """What `ClosedBook` is, by a reader that was trained: only for readers with a LoRA."""

    @dataclass(frozen=True)
    class Config(MethodConfig):
        """No settings."""

    label, kind = "Closed book, LoRA on", "floor"
    note = "the question alone, with the updates that were trained for latents"
    console_label = "  with LoRA"
    with_lora = True
    is_timed = False
