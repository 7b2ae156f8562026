"""The latent answers nearly as well as the text, from a much shorter prefix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from latentwire_fast.evaluation.hypotheses.base import (
    NEEDS_TEXT_READERS,
    TIMES,
    Evidence,
    Hypothesis,
    HypothesisConfig,
)
from latentwire_fast.evaluation.method_result import mean


class AccuracyOfText(Hypothesis):
    """F1 of the latent against F1 of the text."""

    @dataclass(frozen=True)
    class Config(HypothesisConfig):
        """`bar`: F1 difference. `positions`: how many times shorter the prefix is at least."""

        bar: float = -0.02
        positions: float = 4.0

    config: Config
    quantity, unit, side = "latent F1 minus text F1", "points", "least"
    needs, needs_text_readers = NEEDS_TEXT_READERS, True
    reads = ("latent", "text")
    also = f"the prefix is not {Config.positions:g}{TIMES} shorter"

    @property
    def claim(self) -> str:
        """The claim in words."""
        return (
            f"The latent loses at most {-100 * self.config.bar:g} points of F1 against text, at "
            f"{self.config.positions:g}{TIMES} fewer prefix positions"
        )

    def judge(self, evidence: Evidence) -> dict[str, Any]:
        """The worst reader's difference, and the smallest ratio of positions."""
        ratio = min(
            mean(reader["text"].positions) / mean(reader["latent"].positions)
            for reader in evidence.methods.values()
        )
        return self.verdict(
            evidence.latent_against("text"),
            also=ratio >= self.config.positions,
            position_ratio=ratio,
        )

    def circumstance(self, found: Mapping[str, Any]) -> str:
        """The words that say at how many times fewer positions."""
        ratio = found.get("position_ratio")
        return "" if ratio is None else f" at {ratio:,.1f}{TIMES} fewer positions"
