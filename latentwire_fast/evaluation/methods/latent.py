"""The latent, as decoded from its payload."""

from __future__ import annotations

from dataclasses import dataclass

from latentwire_fast.evaluation.methods.base import (
    ByBits,
    EvaluationCase,
    EvaluationMethod,
    MethodConfig,
    MethodInput,
    latent_input,
)


class Latent(EvaluationMethod):
    """Each example's own payload in the place of its text."""

    @dataclass(frozen=True)
    class Config(MethodConfig):
        """No settings."""

    label, note, kind = "Latent", "the payload, at this run's bits", "ours"
    sends = "payload"
    is_timed = in_model_card = True
    by_bits = ByBits(
        (("f1", "{reader} F1"), ("em", "{reader} EM")), legend="payload", marker="o", line="-"
    )

    def build(self, case: EvaluationCase, rows: range, *, bits: int) -> MethodInput:
        """The payloads as they are."""
        return latent_input(case, rows, [case.payloads[bits][i] for i in rows])
