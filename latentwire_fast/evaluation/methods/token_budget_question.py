"""The context cut to as many tokens as the latent takes positions, the question kept."""

from __future__ import annotations

from dataclasses import dataclass

from latentwire_fast.evaluation.methods.base import (
    EvaluationCase,
    EvaluationMethod,
    MethodConfig,
    MethodInput,
    text_input,
)
from latentwire_fast.prompts.builder import context_text, question_text


class TokenBudgetQuestion(EvaluationMethod):
    """The question kept and the context cut: to M less the question (pure mode), or to M (context
    mode)."""

    @dataclass(frozen=True)
    class Config(MethodConfig):
        """No settings."""

    label, kind = "Token budget, question kept", "budget"
    note = "the context cut to what is left of M"
    console_label = "  question kept"
    is_timed = True

    def build(self, case: EvaluationCase, rows: range, *, bits: int) -> MethodInput:
        """The context's first tokens, then the question."""
        ids = case.reader.prompts.text_ids
        cut = []
        for i in rows:
            example = case.examples[i]
            question = ids(question_text(example.question))
            left = case.positions_of(i) - (len(question) if case.mode == "pure" else 0)
            context = ids(context_text(example.context))[: case.free_label + max(0, left)]
            cut.append([*context, *question])
        return text_input(case, rows, cut)
