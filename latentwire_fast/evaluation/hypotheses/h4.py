"""Readers that judge each other's answers choose better than the better one of them alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from latentwire_fast.evaluation.hypotheses.base import (
    NEEDS_TEXT_READERS,
    NOT_MEASURED,
    Evidence,
    Hypothesis,
    HypothesisConfig,
)
from latentwire_fast.evaluation.method_result import mean


class GainOfJointRescoring(Hypothesis):
    """F1 of the jointly chosen answers against F1 of the best single reader."""

    @dataclass(frozen=True)
    class Config(HypothesisConfig):
        """`bar`: F1 difference."""

        bar: float = 0.015

    quantity, unit, side = "joint F1 minus the best single F1", "points", "least"
    needs, needs_text_readers = f"two {NEEDS_TEXT_READERS}", True

    @property
    def claim(self) -> str:
        """The claim in words."""
        return (
            f"Rescoring the readers' candidates gains at least {100 * self.config.bar:g} points of "
            "F1 over the better reader"
        )

    def judge(self, evidence: Evidence) -> dict[str, Any]:
        """The difference to the best reader; not measured with one reader."""
        if evidence.joint is None:
            return NOT_MEASURED
        best = max((reader["latent"].f1 for reader in evidence.methods.values()), key=mean)
        return self.verdict(evidence.difference(evidence.joint.f1, best))
