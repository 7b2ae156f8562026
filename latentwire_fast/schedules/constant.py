"""One number for all steps."""

from __future__ import annotations

from dataclasses import dataclass

from latentwire_fast.config.schema import ScheduleConfig


class Constant:
    """The same number at every step."""

    @dataclass(frozen=True)
    class Config(ScheduleConfig):
        """Settings of a constant.

        Attributes:
            level: the number.
        """

        level: float = 1.0

    def __init__(self, config: Config) -> None:
        self.config = config

    def value(self, step: int, total: int) -> float:
        """The number at a step."""
        return self.config.level
