"""The context's first words as the answer: a floor without a model."""

from __future__ import annotations

from dataclasses import dataclass

from latentwire_fast.evaluation.methods.base import (
    EvaluationCase,
    EvaluationMethod,
    MethodConfig,
    MethodInput,
)


class FirstWords(EvaluationMethod):
    """A few words of the context as the answer: a score that needs no reading."""

    @dataclass(frozen=True)
    class Config(MethodConfig):
        """`words`: how many."""

        words: int = 5

    label, note, kind = "First words", "five words of the context, no model", "floor"
    config: Config

    def build(self, case: EvaluationCase, rows: range, *, bits: int) -> MethodInput:
        """Ready answers."""
        words = (case.examples[i].context.split()[: self.config.words] for i in rows)
        return MethodInput([], [], answers=[" ".join(part) for part in words])
