"""A factor that rises linearly, stays at 1, and falls to zero along half a cosine."""

from __future__ import annotations

import math
from dataclasses import dataclass

from latentwire_fast.config.base import require
from latentwire_fast.config.schema import ScheduleConfig


class WarmupCosine:
    """Linear warm-up to 1, flat, then half a cosine to zero."""

    @dataclass(frozen=True)
    class Config(ScheduleConfig):
        """Settings of a warm-up and a decay.

        Attributes:
            warmup_steps: steps until the factor is 1; 0 begins there.
            decay_from: the share of all steps after which it falls; 1 never does.
        """

        warmup_steps: int = 100
        decay_from: float = 0.3

        def __post_init__(self) -> None:
            super().__post_init__()
            require(
                self.warmup_steps >= 0, f"warmup_steps={self.warmup_steps}, expected at least 0"
            )
            require(0 <= self.decay_from <= 1, f"decay_from={self.decay_from}, expected in [0, 1]")

    def __init__(self, config: Config) -> None:
        self.config = config

    def value(self, step: int, total: int) -> float:
        """The factor at a step."""
        share, decay_from = step / total, self.config.decay_from
        warm = min(1.0, (step + 1) / max(1, self.config.warmup_steps))
        if share <= decay_from:
            return warm
        progress = (share - decay_from) / (1 - decay_from)
        return warm * 0.5 * (1 + math.cos(math.pi * progress))
