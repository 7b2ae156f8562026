"""A reader that the encoder never saw learns to read its payloads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from latentwire_fast.evaluation.hypotheses.base import (
    NOT_MEASURED,
    Evidence,
    Hypothesis,
    HypothesisConfig,
)


class AddedReader(Hypothesis):
    """F1 of the latent against F1 of the text, for readers added to a finished encoder."""

    @dataclass(frozen=True)
    class Config(HypothesisConfig):
        """`bar`: F1 difference."""

        bar: float = -0.05

    quantity = "latent F1 minus text F1 of the added reader"
    unit, side = "points", "least"
    needs, needs_text_readers = "a run that adds a reader", True
    reads = ("latent", "text")

    @property
    def claim(self) -> str:
        """The claim in words."""
        return (
            f"A reader that the encoder never saw comes within {-100 * self.config.bar:g} points "
            "of F1 with an adapter alone"
        )

    def judge(self, evidence: Evidence) -> dict[str, Any]:
        """The worst reader's difference; not measured where the encoder learned with a reader."""
        if not evidence.are_added_readers:
            return NOT_MEASURED
        return self.verdict(evidence.latent_against("text"))
