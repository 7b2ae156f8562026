"""When which row of the prefill benchmark runs: shares of a time limit, and rows that take turns.

Rows of one reader and batch form a group. Groups follow one another, and each gets the share of the
time left that it is expected to need. In a group all rows are made and warmed up first, those that
others are compared with before the others; then they take turns, a cheap one several times in each
round. A group that took longer to be made than expected may exceed its share by the least runs of
the rows that are there. Knows nothing of torch: a test runs it over the real plan with a clock of
its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Generic, TypeVar

from bench.prefill.clock import Sample

# Where time is limited, a row gets at least so many runs, and its warm-ups stop after a while:
# making it has run it a few times already.
LEAST_WARM_UPS, LEAST_REPEATS = 1, 5
WARM_UP_SECONDS = 0.6
# Rows that take less than this (seconds) get all their runs before slower ones get more than 5.
FAST_SECONDS = 0.05
# What is expected besides the runs of rows, in seconds: the first kernels of a process, a reader
# (the first one on an H100 machine took 20), a backbone that is compiled, a row that is made and
# captured. Making a row runs it a few times.
KERNELS_SECONDS, READER_SECONDS, COMPILE_SECONDS = 15.0, 8.0, 75.0
ROW_SECONDS, MAKING_RUNS = 0.5, 3
# A group's rows are not planned to the last second.
SLACK = 0.95
OUT_OF_TIME = "out of time"

Row = TypeVar("Row", bound=Hashable)
Key = TypeVar("Key", bound=Hashable)


@dataclass
class Timed(Generic[Row]):
    """One row while it is measured.

    Attributes:
        run: one timed prefill; None once it failed, so that its memory is free.
        wanted: how many samples it should get.
        seconds: of each run so far, warm-ups with them.
        failure: why it has no samples.
    """

    row: Row
    run: Callable[[], Sample] | None
    wanted: int = 0
    samples: list[Sample] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    failure: str | None = None

    @property
    def cost(self) -> float:
        """Seconds of a run: the median, so that one hiccup makes no slow row."""
        return median(self.seconds) if self.seconds else 0.0

    def once(self) -> Sample | None:
        """One run; None if it failed. A row that fails costs itself alone, also when it runs out
        of memory long after it was made."""
        assert self.run is not None
        started = time.monotonic()
        try:
            sample = self.run()
        except Exception as error:
            self.failure = reason(error)
        else:
            self.seconds.append(time.monotonic() - started)
            return sample
        # The traceback, which holds what the run made, is gone only here.
        self.run = None
        self.samples.clear()
        return None


def reason(error: Exception) -> str:
    """The reason of an error, in one line."""
    return f"{type(error).__name__}: {error}"


def warm_up(timed: Timed[Any], *, runs: int, limited: bool) -> None:
    """Run a row without keeping the times; a slow one less often where time is limited."""
    started = time.monotonic()
    for done in range(runs):
        slow = limited and time.monotonic() - started >= WARM_UP_SECONDS
        if (slow and done >= LEAST_WARM_UPS) or timed.once() is None:
            return


def runs_within(seconds: float, costs: Sequence[float], *, repeats: int) -> list[int]:
    """The number of runs of each row, if all of them may take so long together.

    At least 5 times, whatever the time; rows of less than 50 ms up to `repeats` times before the
    others share what is left.
    """
    runs = [min(repeats, LEAST_REPEATS)] * len(costs)
    for fast in (True, False):
        chosen = [i for i, cost in enumerate(costs) if (cost < FAST_SECONDS) == fast]
        others = sum(n * costs[i] for i, n in enumerate(runs) if i not in chosen)
        filled = _fill(seconds - others, [costs[i] for i in chosen], repeats=repeats)
        for i, count in zip(chosen, filled, strict=True):
            runs[i] = count
    return runs


def _fill(seconds: float, costs: Sequence[float], *, repeats: int) -> list[int]:
    """Runs of rows of one kind: all may take equally long, and what one leaves, others get."""
    least = min(repeats, LEAST_REPEATS)

    def runs(each: float) -> list[int]:
        return [max(least, min(repeats, int(each / max(cost, 1e-9)))) for cost in costs]

    def taken(each: float) -> float:
        return sum(n * cost for n, cost in zip(runs(each), costs, strict=True))

    low, high = 0.0, (repeats + 1) * max(costs, default=0.0)
    if taken(high) <= seconds:
        return runs(high)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if taken(middle) <= seconds else (low, middle)
    return runs(low)


def interleave(
    rows: Sequence[Timed[Any]], *, deadline: float | None, latest: float | None = None
) -> Iterator[int]:
    """Run the rows in turns until each has the samples it wants, so that what disturbs the machine
    disturbs all of them: in as many rounds as the slowest row wants samples.

    Args:
        deadline: of `time.monotonic`, after which only rows with less than 5 samples go on.
        latest: after which nothing more is started; the deadline if not given.

    Yields:
        After each run, how many are done.
    """
    done, rounds = 0, min((row.wanted for row in rows), default=0)
    for number in range(1, rounds + 1):
        for row in rows:
            while row.failure is None and len(row.samples) < row.wanted * number // rounds:
                if _over(deadline if latest is None else latest):
                    return
                if len(row.samples) >= LEAST_REPEATS and _over(deadline):
                    break
                sample = row.once()
                if sample is not None:
                    row.samples.append(sample)
                done += 1
                yield done


def _over(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() > deadline


@dataclass(frozen=True)
class Effort:
    """The time and the runs that the rows of a group get.

    Attributes:
        deadline: of `time.monotonic`; None where there is time for everything.
        latest: when the runs must end that a row gets in any case; the deadline if not given.
    """

    warm_ups: int
    repeats: int
    deadline: float | None = None
    latest: float | None = None

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        assert self.deadline is not None
        return self.deadline - time.monotonic()


def measure_rows(
    rows: Sequence[Row],
    make: Callable[[Row], Callable[[], Sample]],
    *,
    effort: Effort,
    release: Callable[[], None],
    watch: Callable[[Iterator[int], int], Iterator[int]],
) -> list[Timed[Row]]:
    """Measure the rows of a group side by side.

    Args:
        rows: in the order in which they are made.
        make: makes a row ready, and checks that it computes the correct result.
        release: gives memory back; called after every failure.
        watch: shows the progress of so many runs.

    Returns:
        All rows; one without samples has a `failure`.
    """
    found: list[Timed[Row]] = []
    for row in rows:
        there = [timed for timed in found if timed.failure is None]
        least = sum(min(effort.repeats, LEAST_REPEATS) * timed.cost for timed in there)
        if effort.deadline is not None and effort.left <= least:
            found.append(Timed(row, None, failure=OUT_OF_TIME))
            continue
        timed = _made(row, make)
        found.append(timed)
        if timed.failure is None:
            warm_up(timed, runs=effort.warm_ups, limited=effort.deadline is not None)
        if timed.failure is not None:
            release()
    there = [timed for timed in found if timed.failure is None]
    wanted = [effort.repeats] * len(there)
    if effort.deadline is not None:
        costs = [timed.cost for timed in there]
        wanted = runs_within(SLACK * effort.left, costs, repeats=effort.repeats)
    for timed, most in zip(there, wanted, strict=True):
        timed.wanted = most
    failed = 0
    runs = interleave(there, deadline=effort.deadline, latest=effort.latest)
    for _ in watch(runs, sum(wanted)):
        if (failures := sum(timed.failure is not None for timed in there)) > failed:
            failed = failures
            release()
    for timed in there:
        if not timed.samples and timed.failure is None:
            timed.failure = OUT_OF_TIME
    return found


def _made(row: Row, make: Callable[[Row], Callable[[], Sample]]) -> Timed[Row]:
    try:
        return Timed(row, make(row))
    except Exception as error:
        failure = reason(error)
    return Timed(row, None, failure=failure)


class Timetable(Generic[Key]):
    """Deadlines of groups that follow one another; readers and kernels are built in between.

    Args:
        expected: seconds, by group; see `expected_seconds`.
        deadline: of all of them; None where there is time for everything.
    """

    def __init__(self, expected: Mapping[Key, float], *, deadline: float | None) -> None:
        self._expected = dict(expected)
        self._deadline = deadline

    def start(self, group: Key) -> float | None:
        """The deadline of a group that starts now: its share of the time left."""
        whole = sum(self._expected.values())
        share = self._expected.pop(group) / whole
        if self._deadline is None:
            return None
        now = time.monotonic()
        return now + share * max(0.0, self._deadline - now)

    def skip(self, group: Key) -> None:
        """Give the time of a group that cannot start to the others. The same for what was built,
        which no deadline ends: the others share what it left, or lack."""
        self._expected.pop(group, None)


def expected_seconds(
    groups: Mapping[Key, Sequence[float]],
    *,
    builds: Mapping[Key, float],
    effort: Effort,
) -> dict[Key, float]:
    """Seconds that each group should take, and what is built.

    Args:
        groups: seconds of one run of each row.
        builds: seconds besides the rows: of groups, or of what is built between them.
        effort: of all groups together.
    """
    costs = [cost for group in groups.values() for cost in group]
    fixed = dict(builds)
    for key, group in groups.items():
        fixed[key] = fixed.get(key, 0.0)
        fixed[key] += sum(ROW_SECONDS + MAKING_RUNS * cost for cost in group)
        fixed[key] += sum(_warm_ups(cost, effort) * cost for cost in group)
    wanted = [effort.repeats] * len(costs)
    if effort.deadline is not None:
        left = SLACK * effort.left - sum(fixed.values())
        wanted = runs_within(left, costs, repeats=effort.repeats)
    samples = iter(runs * cost for runs, cost in zip(wanted, costs, strict=True))
    for key, group in groups.items():
        fixed[key] += sum(next(samples) for _ in group)
    return fixed


def _warm_ups(cost: float, effort: Effort) -> int:
    if effort.deadline is None:
        return effort.warm_ups
    return min(effort.warm_ups, max(LEAST_WARM_UPS, 1 + int(WARM_UP_SECONDS / cost)))
