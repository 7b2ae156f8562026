"""A run's time limit: which step is the next, so that the schedule ends when the time does."""

from __future__ import annotations

from latentwire_fast.config.schema import RunConfig


def next_step(config: RunConfig, step: int, seconds: float, cache_seconds: float = 0.0) -> int:
    """The step behind `step`, after so many seconds of training.

    Steps are left out where the run is behind its time: at half of `config.minutes` half of the
    steps are done or left out. So every stage gets its share of the time, and the learning rate
    comes to its end. A run that is ahead of its time leaves out none.

    Args:
        cache_seconds: of these, what went into work that is done once and kept. The first epoch
            has nearly all of it: the steps share the rest of the time, or the first stage would
            lose its steps.
    """
    if config.minutes is None:
        return step + 1
    whole = max(60 * config.minutes - cache_seconds, 1e-9)
    due = int(min(1.0, (seconds - cache_seconds) / whole) * config.total_steps)
    return min(max(step + 1, due), config.total_steps)


def passes(before: int, after: int, every: int) -> bool:
    """Whether a multiple of `every` lies in `before + 1` to `after`: what is done every so many
    steps is done then, also where steps are left out."""
    return after // every > before // every
