"""The latent answers better than text cut to as many positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from latentwire_fast.evaluation.hypotheses.base import (
    Evidence,
    Hypothesis,
    HypothesisConfig,
)


class AccuracyAboveBudgets(Hypothesis):
    """F1 of the latent against F1 of both token budgets."""

    @dataclass(frozen=True)
    class Config(HypothesisConfig):
        """`bar`: F1 difference."""

        bar: float = 0.03

    quantity = "latent F1 minus the best token budget's F1"
    unit, side = "points", "least"
    needs = "latent and token-budget scores"
    reads = ("latent", "token_budget", "token_budget_question")

    @property
    def claim(self) -> str:
        """The claim in words."""
        return (
            f"The latent is at least {100 * self.config.bar:g} points of F1 above the prompt cut "
            "to as many positions"
        )

    def judge(self, evidence: Evidence) -> dict[str, Any]:
        """The difference to the better budget."""
        budgets = self.reads[1:]
        return self.verdict(min(evidence.latent_against(budget) for budget in budgets))
