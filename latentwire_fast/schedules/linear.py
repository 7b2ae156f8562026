"""A number that goes from one value to another along a straight line."""

from __future__ import annotations

from dataclasses import dataclass

from latentwire_fast.config.base import require
from latentwire_fast.config.schema import ScheduleConfig


class Linear:
    """From `start` to `end` along a straight line, and flat before and behind it."""

    @dataclass(frozen=True)
    class Config(ScheduleConfig):
        """Settings of a ramp.

        Attributes:
            start, end: the numbers before and behind it, at least 0.
            from_share, until_share: the shares of all steps between which it lies. Until 0.9, the
                last tenth of the steps has the number `end`.
        """

        start: float = 0.0
        end: float = 1.0
        from_share: float = 0.0
        until_share: float = 1.0

        def __post_init__(self) -> None:
            super().__post_init__()
            for name in ("start", "end"):
                value = getattr(self, name)
                require(value >= 0, f"{name}={value}, expected at least 0")
            require(
                0 <= self.from_share < self.until_share <= 1,
                f"from_share={self.from_share}, until_share={self.until_share}: expected shares "
                "from 0 to 1, the first one smaller",
            )

    def __init__(self, config: Config) -> None:
        self.config = config

    def value(self, step: int, total: int) -> float:
        """The number at a step."""
        c = self.config
        share = (step / total - c.from_share) / (c.until_share - c.from_share)
        if share >= 1:
            return c.end  # exactly: a sum of parts may miss it by a rounding
        return c.start + (c.end - c.start) * self.way(max(0.0, share))

    def way(self, share: float) -> float:
        """How far it has come (0 to 1) in a share of its steps."""
        return share
