"""The gold answers are nearly as likely given the latent as given the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from latentwire_fast.evaluation.hypotheses.base import (
    NEEDS_TEXT_READERS,
    TIMES,
    Evidence,
    Hypothesis,
    HypothesisConfig,
)

SMALLEST_NLL = 1e-9  # fp32 rounds a very sure answer's log-probability to 0


class LikelihoodOfText(Hypothesis):
    """Negative log-likelihood of the gold answers given the latent, against that given the text."""

    @dataclass(frozen=True)
    class Config(HypothesisConfig):
        """`bar`: ratio of the likelihoods per token."""

        bar: float = 1.05

    quantity, unit, side = "latent NLL over text NLL", "ratio", "most"
    needs, needs_text_readers = NEEDS_TEXT_READERS, True
    reads = ("latent", "text")

    @property
    def claim(self) -> str:
        """The claim in words."""
        return (
            f"Gold answers cost at most {self.config.bar:g}{TIMES} the NLL per token that they "
            "cost with text"
        )

    def judge(self, evidence: Evidence) -> dict[str, Any]:
        """The worst reader's ratio."""
        return self.verdict(
            max(
                evidence.ratio(
                    reader["latent"].nll, [max(nll, SMALLEST_NLL) for nll in reader["text"].nll]
                )
                for reader in evidence.methods.values()
            )
        )
