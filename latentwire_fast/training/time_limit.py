"""A run's time limit: which step is the next, so that the schedule ends when the time does."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from latentwire_fast.config.schema import RunConfig

RECENT = 16  # steps whose time says how long the next ones take


@dataclass
class Pace:
    """How long the steps of a run take now.

    The first step of a process and of each stage says nothing about the others: kernels are
    compiled in it (on an H100 a first step took 4.5 s, the next ones 0.04 s each).

    Attributes:
        recent: seconds of the last steps, without these first ones.
        beside: seconds between steps (validations). steps: how many steps were done.
        place: how far the run has come, not rounded: what rounding takes from one step is given
            to the next.
    """

    recent: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    beside: float = 0.0
    steps: int = 0
    place: float = 0.0
    _stage: str | None = None
    _is_fresh: bool = True

    def add(self, seconds: float, *, stage: str) -> None:
        """A step of a stage took so long."""
        self.steps += 1
        if stage != self._stage:
            self._stage, self._is_fresh = stage, True
            return
        if self._is_fresh:  # the steps before were another stage's
            self.recent.clear()
            self._is_fresh = False
        self.recent.append(seconds)

    @property
    def seconds(self) -> float | None:
        """Of a step, with its share of what is done between steps; None before it is known.

        The slowest quarter of the recent steps is left out: something was computed once in them.
        """
        if not self.recent:
            return None
        kept = sorted(self.recent)[: max(1, 3 * len(self.recent) // 4)]
        return sum(kept) / len(kept) + self.beside / self.steps


def next_step(config: RunConfig, step: int, seconds: float, pace: Pace) -> int:
    """The step behind `step`, after so many seconds of training.

    Where the time that is left is too short for all steps that are left, at the pace of the last
    ones, as many as fit are done and the others are left out evenly. So every stage gets its share
    of the time, and the learning rate comes to its end. What takes time once (compiling kernels,
    computing what is kept on disk) shortens all that follows a little, and no stage alone.
    """
    if config.minutes is None:
        return step + 1
    left = 60 * config.minutes - seconds
    if left <= 0:
        return config.total_steps
    if pace.seconds is None:
        return min(step + 1, config.total_steps)
    place = pace.place if step <= pace.place < step + 1 else float(step)
    fitting = max(1.0, left / max(pace.seconds, 1e-9))
    pace.place = place + max(1.0, (config.total_steps - 1 - place) / fitting)
    # What is a whole number but for rounding is that number.
    return min(max(step + 1, int(pace.place + 1e-6)), config.total_steps)


def passes(before: int, after: int, every: int) -> bool:
    """Whether a multiple of `every` lies in `before + 1` to `after`: what is done every so many
    steps is done then, also where steps are left out."""
    return after // every > before // every
