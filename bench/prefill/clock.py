"""Times of a prefill, phase by phase.

A phase ends where `mark` is called. On the CPU that is a reading of the clock; on a GPU an event in
the stream, which between prefills is idle, so that an event recorded there has the host's time, and
the phases of host and device follow one another without a gap. Events are recorded inside captured
graphs as well (`external`), where each replay renews them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

# In the order in which they happen; a graph records its own before the others of its first run.
PHASES = (
    *("load encoder", "encode", "tokenise", "parse", "dequantise", "adapter", "placement"),
    *("reader", "token"),
)
START = "start"
RESAMPLES = 2000


@dataclass(frozen=True)
class Sample:
    """Milliseconds of one prefill, from the request to the token on the host."""

    total: float
    phases: dict[str, float]


class Clock:
    """Times the prefills of one row. `mark` is what a `Receiver` calls."""

    def __init__(self, device: str) -> None:
        self._on_gpu = device != "cpu"
        self._marks: dict[str, Any] = {}
        self._started = 0.0

    def start(self) -> None:
        """A request has arrived."""
        if self._on_gpu:
            torch.cuda.synchronize()
        self._started = time.perf_counter()
        self.mark(START)

    def mark(self, phase: str) -> None:
        """The phase is over, or queued."""
        if not self._on_gpu:
            self._marks[phase] = time.perf_counter()
            return
        if phase not in self._marks:
            self._marks[phase] = torch.cuda.Event(enable_timing=True, external=True)
        self._marks[phase].record()

    def stop(self) -> Sample:
        """The token is on the host."""
        if self._on_gpu:
            torch.cuda.synchronize()
        total = 1e3 * (time.perf_counter() - self._started)
        order = [START, *(phase for phase in PHASES if phase in self._marks)]
        return Sample(
            total,
            {phase: self._between(before, phase) for before, phase in pairwise(order)},
        )

    def _between(self, before: str, phase: str) -> float:
        first, second = self._marks[before], self._marks[phase]
        return first.elapsed_time(second) if self._on_gpu else 1e3 * (second - first)


def percentile(values: Sequence[float], q: float) -> float:
    return float(np.percentile(values, q))


def interval(values: Sequence[float], *, seed: int = 0) -> tuple[float, float]:
    """95% bootstrap interval of the median."""
    draws = np.random.default_rng(seed).choice(values, (RESAMPLES, len(values)))
    low, high = np.percentile(np.median(draws, 1), [2.5, 97.5])
    return float(low), float(high)
