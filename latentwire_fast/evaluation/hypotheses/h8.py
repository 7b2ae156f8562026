"""The payload is smaller than the text is when a reader itself codes it, without much loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from latentwire_fast.evaluation.hypotheses.base import (
    NEEDS_TEXT_READERS,
    NOT_MEASURED,
    Evidence,
    Hypothesis,
    HypothesisConfig,
)


class BytesBelowCodedText(Hypothesis):
    """Payload bytes over those of the text coded by a reader, at the narrowest bit width that keeps
    the text's F1.

    Coded text is about the information that the reader finds in the text, so nothing that gives the
    whole text back is shorter. What it costs the receiver stands beside the verdict: a step of the
    reader per token and then a prefill of the text, where a payload needs a prefill of its own.
    """

    @dataclass(frozen=True)
    class Config(HypothesisConfig):
        """`bar`: ratio of the bytes. `kept`: share of every reader's text F1 that must be kept."""

        bar: float = 1.0
        kept: float = 0.95

    config: Config
    quantity, unit, side = (
        "payload bytes over bytes of the text coded by a reader",
        "ratio",
        "below",
    )
    needs, needs_text_readers = f"{NEEDS_TEXT_READERS} and code it", True
    reads = ("latent", "text")
    also = f"no bit width keeps {100 * Config.kept:g}% of every reader's text F1"

    @property
    def claim(self) -> str:
        """The claim in words."""
        return (
            "The payload is smaller than the text coded by a reader itself at "
            f"{100 * self.config.kept:g}% of the text's F1"
        )

    def judge(self, evidence: Evidence) -> dict[str, Any]:
        """The worst reader's ratio, and per reader the milliseconds to an answer's first token."""
        if set(evidence.coded) != set(evidence.methods):
            return NOT_MEASURED
        bits, is_kept = evidence.narrowest(kept=self.config.kept)
        payload = evidence.payload_sizes[bits]
        worst = max(evidence.ratio(payload, coded.sizes) for coded in evidence.coded.values())
        times = {name: dict(coded.first_token_ms) for name, coded in evidence.coded.items()}
        return self.verdict(worst, also=is_kept, bits=bits, first_token_ms_p50=times)

    def circumstance(self, found: Mapping[str, Any]) -> str:
        """The words that say at which bit width, and what each costs the receiver."""
        words = f" at {found['bits']} bits" if found.get("bits") is not None else ""
        costs = [
            f"{name} {times['payload']:.0f} ms against {times['coded_text']:.0f} ms"
            for name, times in (found.get("first_token_ms_p50") or {}).items()
            if times.get("payload") is not None and times.get("coded_text") is not None
        ]
        return f"{words}; to the first token: {', '.join(costs)}" if costs else words
