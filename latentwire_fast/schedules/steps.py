"""A number that changes at given shares of the steps, and stays the same in between."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

from latentwire_fast.config.base import require
from latentwire_fast.config.schema import ScheduleConfig


class Steps:
    """A number that changes at given shares of the steps, and stays the same in between."""

    @dataclass(frozen=True)
    class Config(ScheduleConfig):
        """Settings of a number that changes in steps.

        Attributes:
            levels: `((until_share, level), ...)`: each level counts for the steps before
                `until_share` of them all are done, the last one also for what is left. A level is
                at least 0.
        """

        levels: tuple[tuple[float, float], ...] = field(default=((1.0, 1.0),))

        def __post_init__(self) -> None:
            super().__post_init__()
            require(bool(self.levels), "levels=(), expected at least one (until_share, level)")
            shares = [share for share, _ in self.levels]
            require(
                all(0 < share <= 1 for share in shares)
                and all(before < after for before, after in pairwise(shares)),
                f"levels={self.levels}: expected shares above 0 that rise to at most 1",
            )
            # A learning rate below 0 would train away from the answers, without a word.
            require(
                all(level >= 0 for _, level in self.levels),
                f"levels={self.levels}: expected levels of at least 0",
            )

    def __init__(self, config: Config) -> None:
        self.config = config

    def value(self, step: int, total: int) -> float:
        """The number at a step."""
        for until, level in self.config.levels:
            if step / total < until:
                return level
        return self.config.levels[-1][1]
