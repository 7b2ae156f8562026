"""The base class of schedules: a number as a pure function of the step, so that resuming needs no
state."""

from __future__ import annotations

from typing import Protocol

from latentwire_fast.config.schema import ScheduleConfig
from latentwire_fast.registry import SCHEDULES


class Schedule(Protocol):
    """A number that changes with the step.

    A schedule is made from its own settings, `Config`, alone.
    """

    def value(self, step: int, total: int) -> float:
        """The number at a step.

        Args:
            step: 0-based.
            total: how many steps there are, of the run or of the stage that it is a schedule of.
        """
        ...


class AccuracySchedule(Schedule, Protocol):
    """A number that goes by how often answers are right: its settings say `needs_accuracy`.

    All that it knows is a progress from 0 to 1, which a run's checkpoints hold.
    """

    def at(self, progress: float) -> float:
        """The number at a progress."""
        ...

    def advance(self, progress: float, accuracy: float) -> float:
        """The progress behind a step with this running mean of the accuracy, 0 to 1."""
        ...


def build_schedule(config: ScheduleConfig) -> Schedule:
    """The schedule that settings describe.

    Raises:
        ConfigError: they are of no registered schedule.
    """
    schedule: Schedule = SCHEDULES.part_of(config)(config)
    return schedule
