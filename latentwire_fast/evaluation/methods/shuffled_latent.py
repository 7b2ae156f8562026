"""Another example's payload: what a latent scores without its own example's content."""

from __future__ import annotations

from dataclasses import dataclass

from latentwire_fast.evaluation.methods.base import (
    EvaluationCase,
    EvaluationMethod,
    MethodConfig,
    MethodInput,
    latent_input,
)


class ShuffledLatent(EvaluationMethod):
    """The payload of the next example that has another context."""

    @dataclass(frozen=True)
    class Config(MethodConfig):
        """No settings."""

    label, note, kind = "Shuffled latent", "another example's payload", "floor"
    sends = "payload"
    is_control = in_model_card = True

    def not_measured(self, case: EvaluationCase) -> str | None:
        """The reason where all examples have one context: then there is no other payload."""
        if case.other_contexts[0] != 0:
            return None
        return "all examples have the same context, so no other example's payload can be taken"

    def build(self, case: EvaluationCase, rows: range, *, bits: int) -> MethodInput:
        """The payloads of other examples."""
        return latent_input(case, rows, [case.payloads[bits][case.other_contexts[i]] for i in rows])
