"""The latent answers better than text shortened to as many positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from latentwire_fast.evaluation.hypotheses.base import (
    Evidence,
    Hypothesis,
    HypothesisConfig,
)


class AccuracyAboveBudgets(Hypothesis):
    """F1 of the latent against F1 of the best text of as many positions: cut, pruned, or the
    sentences that match the question."""

    @dataclass(frozen=True)
    class Config(HypothesisConfig):
        """`bar`: F1 difference."""

        bar: float = 0.03

    quantity = "latent F1 minus the best shortened text's F1"
    unit, side = "points", "least"
    needs = "the scores of the latent and of shortened texts"
    reads = ("latent", "token_budget", "token_budget_question", "bm25_sentences")
    where_measured = ("selective_context",)  # a reader may not have the positions to prune a text

    @property
    def claim(self) -> str:
        """The claim in words."""
        return (
            f"The latent is at least {100 * self.config.bar:g} points of F1 above the best text "
            "shortened to as many positions"
        )

    def judge(self, evidence: Evidence) -> dict[str, Any]:
        """The difference to the best of them."""
        budgets = [*self.reads[1:], *filter(evidence.has, self.where_measured)]
        return self.verdict(min(evidence.latent_against(budget) for budget in budgets))
