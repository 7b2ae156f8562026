"""The text cut to as many tokens as the latent takes positions, from its start."""

from __future__ import annotations

from dataclasses import dataclass

from latentwire_fast.evaluation.methods.base import (
    EvaluationCase,
    EvaluationMethod,
    MethodConfig,
    MethodInput,
    text_input,
)
from latentwire_fast.prompts.builder import full_text


class TokenBudget(EvaluationMethod):
    """The prompt cut to M tokens, whatever they are: the question is usually lost."""

    @dataclass(frozen=True)
    class Config(MethodConfig):
        """No settings."""

    label, note, kind = "Token budget", "the prompt cut to M positions", "budget"
    is_timed = in_model_card = True

    def build(self, case: EvaluationCase, rows: range, *, bits: int) -> MethodInput:
        """The first M tokens."""
        ids = case.reader.prompts.text_ids
        examples = [case.examples[i] for i in rows]
        cut = [
            ids(full_text(e.context, e.question))[: case.positions_of(i)]
            for i, e in zip(rows, examples, strict=True)
        ]
        inputs = text_input(case, rows, cut)
        # The cut runs over context and question alike, so in either mode all of it counts.
        inputs.positions = [prompt.content for prompt in inputs.prompts]
        return inputs
