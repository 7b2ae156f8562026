"""A payload of zeros: what a latent scores without any content."""

from __future__ import annotations

from dataclasses import dataclass

from latentwire_fast.evaluation.methods.base import (
    EvaluationCase,
    EvaluationMethod,
    MethodConfig,
    MethodInput,
    latent_input,
)


class ZeroLatent(EvaluationMethod):
    """One payload of zeros for all examples."""

    @dataclass(frozen=True)
    class Config(MethodConfig):
        """No settings."""

    label, note, kind = "Zero latent", "a payload of zeros", "floor"
    console_label = None
    sends = "payload"
    is_control = True

    def build(self, case: EvaluationCase, rows: range, *, bits: int) -> MethodInput:
        """The payload of an all-zero latent, for every example."""
        return latent_input(case, rows, [case.zero_payload(i, bits=bits) for i in rows])
