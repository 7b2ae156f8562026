"""A number that goes from one value to another along half a cosine."""

from __future__ import annotations

import math
from dataclasses import dataclass

from latentwire_fast.schedules.linear import Linear


class Cosine(Linear):
    """From `start` to `end`, slowly at both ends, and flat before and behind."""

    @dataclass(frozen=True)
    class Config(Linear.Config):
        """Settings of a smooth ramp: those of `linear`."""

    def way(self, share: float) -> float:
        """How far it has come (0 to 1) in a share of its steps."""
        return 0.5 * (1 - math.cos(math.pi * share))
