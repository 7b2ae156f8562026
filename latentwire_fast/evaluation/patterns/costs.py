"""What one question costs: bytes, operations and milliseconds, measured one question at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import mean, median

import torch

from latentwire_fast.evaluation.flops import count_flops


@dataclass(frozen=True)
class Work:
    """Operations (in 10^9) and milliseconds of a piece of work."""

    gflops: float = 0.0
    ms: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.gflops + other.gflops, self.ms + other.ms)

    def times(self, factor: float) -> Work:
        """So many times as much."""
        return Work(factor * self.gflops, factor * self.ms)


@dataclass(frozen=True)
class Cost:
    """What one question costs.

    Attributes:
        bytes: that are sent of its text, or of all of its texts.
        gflops, ms: what all readers together do for it, one after the other.
        sender_gflops, sender_ms: what the encoder does for it; nothing where text is sent.
    """

    bytes: float
    gflops: float
    ms: float
    sender_gflops: float = 0.0
    sender_ms: float = 0.0

    @classmethod
    def of(cls, sizes: Sequence[float], work: Work, sender: Work | None = None) -> Cost:
        """The cost of `work` on what has these sizes on average."""
        sender = sender or Work()
        return cls(mean(sizes), work.gflops, work.ms, sender.gflops, sender.ms)


@torch.no_grad()
def measure(work: Callable[[int], object], count: int) -> Work:
    """The mean operations and the median milliseconds of `work(0)` to `work(count - 1)`.

    Each runs twice: operations are counted in the first run, which is its warm-up too.
    """
    flops: list[int] = []
    times: list[float] = []
    for i in range(count):
        flops.append(count_flops(partial(work, i)))
        _wait()
        start = time.perf_counter()
        work(i)
        _wait()
        times.append((time.perf_counter() - start) * 1e3)
    return Work(mean(flops) / 1e9, median(times)) if count else Work()


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
