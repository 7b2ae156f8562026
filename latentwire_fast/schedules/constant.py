"""One number for all steps."""

from __future__ import annotations

from dataclasses import dataclass

from latentwire_fast.config.base import require
from latentwire_fast.config.schema import ScheduleConfig


class Constant:
    """The same number at every step."""

    @dataclass(frozen=True)
    class Config(ScheduleConfig):
        """Settings of a constant.

        Attributes:
            level: the number, at least 0.
        """

        level: float = 1.0

        def __post_init__(self) -> None:
            super().__post_init__()
            require(self.level >= 0, f"level={self.level}, expected at least 0")

    def __init__(self, config: Config) -> None:
        self.config = config

    def value(self, step: int, total: int) -> float:
        """The number at a step."""
        return self.config.level
