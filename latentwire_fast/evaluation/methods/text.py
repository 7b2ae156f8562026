"""The whole prompt as text: what every other method is held against."""

from __future__ import annotations

from dataclasses import dataclass

from latentwire_fast.evaluation.methods.base import (
    EvaluationCase,
    EvaluationMethod,
    MethodConfig,
    MethodInput,
    text_input,
)


class Text(EvaluationMethod):
    """The whole prompt, read as text."""

    @dataclass(frozen=True)
    class Config(MethodConfig):
        """No settings."""

    label, note, kind = "Full text", "the whole prompt, read as text", "reference"
    sends = "text"
    is_timed = in_model_card = True

    def build(self, case: EvaluationCase, rows: range, *, bits: int) -> MethodInput:
        """The whole text."""
        return text_input(case, rows, [None] * len(rows))
