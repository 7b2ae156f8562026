"""A number that goes on while answers are right often enough, and back when they are not."""

from __future__ import annotations

from dataclasses import dataclass

from latentwire_fast.config.base import require
from latentwire_fast.config.schema import ScheduleConfig


class Gated:
    """From `start` towards `end`, as long as a measured accuracy is at the gate or above.

    With `answer.tokens` this is the seeds' adaptive K: one token of each answer counts until first
    tokens are right, then two, and so on. Its state is one number, the progress, which the run's
    checkpoints hold.
    """

    @dataclass(frozen=True)
    class Config(ScheduleConfig):
        """Settings of a number that goes by an accuracy.

        Attributes:
            gate: the running mean of the accuracy that opens the way: of the answers' first tokens
                where these are measured, else of all their tokens.
            start, end: the number before the gate is reached, and after `rise` steps above it.
            rise: how many steps above the gate lead from `start` to `end`.
            back_off: how many steps' progress a step below the gate takes back; 0 waits instead.
        """

        gate: float = 0.5
        start: float = 0.0
        end: float = 1.0
        rise: int = 100
        back_off: float = 1.0

        @property
        def needs_accuracy(self) -> bool:
            """It does."""
            return True

        def __post_init__(self) -> None:
            super().__post_init__()
            self.at_least_one("rise")
            require(0 < self.gate <= 1, f"gate={self.gate}, expected above 0, at most 1")
            for name in ("start", "end", "back_off"):
                value = getattr(self, name)
                require(value >= 0, f"{name}={value}, expected at least 0")

    def __init__(self, config: Config) -> None:
        self.config = config

    def value(self, step: int, total: int) -> float:
        """The number before anything was measured."""
        return self.at(0.0)

    def at(self, progress: float) -> float:
        """The number at a progress of 0 to 1."""
        c = self.config
        return c.end if progress >= 1 else c.start + (c.end - c.start) * progress

    def advance(self, progress: float, accuracy: float) -> float:
        """The progress behind a step with this running mean of the accuracy."""
        c = self.config
        steps = 1.0 if accuracy >= c.gate else -c.back_off
        return min(1.0, max(0.0, progress + steps / c.rise))
