"""The payload is smaller than the text is after brotli, without much loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from latentwire_fast.evaluation.hypotheses.base import (
    NEEDS_TEXT_READERS,
    Evidence,
    Hypothesis,
    HypothesisConfig,
)


class BytesBelowBrotli(Hypothesis):
    """Payload bytes over brotli bytes at the narrowest bit width that keeps the text's F1."""

    @dataclass(frozen=True)
    class Config(HypothesisConfig):
        """`bar`: ratio of the bytes. `kept`: share of every reader's text F1 that must be kept."""

        bar: float = 1.0
        kept: float = 0.95

    config: Config
    quantity, unit, side = "payload bytes over brotli bytes", "ratio", "below"
    needs, needs_text_readers = NEEDS_TEXT_READERS, True
    reads = ("latent", "text")
    also = f"no bit width keeps {100 * Config.kept:g}% of every reader's text F1"

    @property
    def claim(self) -> str:
        """The claim in words."""
        return (
            "The payload is smaller than the brotli-compressed text at "
            f"{100 * self.config.kept:g}% of the text's F1"
        )

    def judge(self, evidence: Evidence) -> dict[str, Any]:
        """The ratio at that width; at the narrowest of all where none keeps enough."""
        bits, is_kept = evidence.narrowest(kept=self.config.kept)
        ratio = evidence.ratio(evidence.payload_sizes[bits], evidence.brotli_sizes)
        return self.verdict(ratio, also=is_kept, bits=bits)

    def circumstance(self, found: Mapping[str, Any]) -> str:
        """The words that say at which bit width."""
        return f" at {found['bits']} bits" if found.get("bits") is not None else ""
