"""Settings of validation while a run trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from latentwire_fast.config.base import Settings, require


@dataclass(frozen=True)
class ValidationConfig(Settings):
    """Scores on a fixed slice of the training sources while a run trains.

    Attributes:
        every: steps between two validations; the last step has one too.
        examples: size of the slice.
        metric: `nll` (per token of the answers) or `f1`; the mean over readers says which step is
            the best one.
        ema: the share of the metric's running mean that stays at each validation: one lucky value
            makes no best step. 0 takes every value as it is.
        patience: training ends after so many validations in a row that were not the best; None: it
            goes on to the last step.
        use_best: whether the run's model is the best step's; otherwise it is the last step's, and
            the best one is kept beside it.
    """

    every: int = 200
    examples: int = 64
    metric: Literal["nll", "f1"] = "nll"
    ema: float = 0.5
    patience: int | None = None
    use_best: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least_one("every", "examples", "patience")
        require(0 <= self.ema < 1, f"ema={self.ema}, expected at least 0, below 1")
