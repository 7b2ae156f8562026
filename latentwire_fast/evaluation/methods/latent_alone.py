"""The latent without the slots that are other readers' own, as a payload for one reader alone."""

from __future__ import annotations

from dataclasses import dataclass

from latentwire_fast import wire
from latentwire_fast.evaluation.method_result import mean
from latentwire_fast.evaluation.methods.base import (
    EvaluationCase,
    EvaluationMethod,
    MethodConfig,
    MethodInput,
    latent_input,
)


class LatentAlone(EvaluationMethod):
    """Each example's payload for the case's reader alone, where readers have slots of their own.

    At 16 bits it says the same as the payload for all readers. At fewer bits values share scales
    with what stands beside them, which may be another slot.
    """

    @dataclass(frozen=True)
    class Config(MethodConfig):
        """No settings."""

    label, kind = "Latent for it alone", "ours"
    note = "shared slots and this reader's own; fewer bytes"
    console_label = "for it alone"
    sends = "payload"
    is_optional = True

    def fits(self, case: EvaluationCase) -> bool:
        """Where a payload for this reader alone is another one than that for all."""
        return bool(case.alone)

    def facts(self, case: EvaluationCase) -> dict[str, float]:
        """Its bytes at the run's bits."""
        alone = case.alone[case.model.bottleneck.config.bits]
        return {"payload_mean": mean([*map(wire.payload_bytes, alone)])}

    def build(self, case: EvaluationCase, rows: range, *, bits: int) -> MethodInput:
        """The payloads as they are."""
        return latent_input(case, rows, [case.alone[bits][i] for i in rows])
