"""The question without any context: what the reader knows or guesses."""

from __future__ import annotations

from dataclasses import dataclass

from latentwire_fast.evaluation.methods.base import (
    EvaluationCase,
    EvaluationMethod,
    MethodConfig,
    MethodInput,
    content_positions,
    turns,
)


class ClosedBook(EvaluationMethod):
    """The question alone."""

    @dataclass(frozen=True)
    class Config(MethodConfig):
        """No settings."""

    label, note, kind = "Closed book", "the question alone", "floor"
    is_timed = True

    def build(self, case: EvaluationCase, rows: range, *, bits: int) -> MethodInput:
        """Prompts without a context."""
        examples = [case.examples[i] for i in rows]
        prompts = [case.reader.prompts.build(turns(e), context=None) for e in examples]
        return MethodInput(prompts, content_positions(case, prompts, examples))
