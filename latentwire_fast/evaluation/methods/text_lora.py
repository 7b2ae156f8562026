"""The whole prompt as text, read with the reader's low-rank updates (LoRA)."""

from __future__ import annotations

from dataclasses import dataclass

from latentwire_fast.evaluation.methods.base import MethodConfig
from latentwire_fast.evaluation.methods.text import Text


class TextLora(Text):
    """What `Text` is, by a reader that was trained: only for readers with a LoRA."""

    @dataclass(frozen=True)
    class Config(MethodConfig):
        """No settings."""

    label, kind = "Full text, LoRA on", "reference"
    note = "the whole prompt, with the updates that were trained for latents"
    console_label = "  with LoRA"
    with_lora = True
    is_timed = in_model_card = False
