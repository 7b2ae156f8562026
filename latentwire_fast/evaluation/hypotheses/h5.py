"""The latent is read faster than the text, and its payload is smaller."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from latentwire_fast.evaluation.hypotheses.base import (
    NOT_MEASURED,
    Evidence,
    Hypothesis,
    HypothesisConfig,
)
from latentwire_fast.evaluation.method_result import mean
from latentwire_fast.evaluation.metrics import Interval


class PrefillTime(Hypothesis):
    """Prefill time of the text over that of the latent, and payload bytes below the text's."""

    @dataclass(frozen=True)
    class Config(HypothesisConfig):
        """`bar`: ratio of the times."""

        bar: float = 1.0

    quantity, unit, side = "text prefill time over latent prefill time", "ratio", "above"
    needs = "timings"
    reads = ("latent", "text")
    also = "the payload is not smaller than the text"

    @property
    def claim(self) -> str:
        """The claim in words."""
        return "Prefill takes less time and the payload fewer bytes than the text"

    def judge(self, evidence: Evidence) -> dict[str, Any]:
        """The worst reader's ratio of two medians, which has no interval."""
        ratios = []
        for reader in evidence.methods.values():
            text, latent = reader["text"].prefill_ms, reader["latent"].prefill_ms
            if text is None or latent is None:
                return NOT_MEASURED
            ratios.append(text / latent)
        worst = min(ratios)
        return self.verdict(
            Interval(worst, worst, worst),
            also=mean(evidence.payload_sizes[evidence.bits]) < mean(evidence.utf8_sizes),
        ) | {"low": None, "high": None}
