"""Clocks of calls, side by side: every round times each of them once.

On a GPU a call that takes tens of microseconds or more is timed by events, with the L2 cache
flushed before it. A shorter one is recorded many times into a CUDA graph, over copies of its inputs
that are five times as large as L2 together, and the replay is timed: so launches from Python,
which would be all that is seen, are left out, and so are cache hits that no real call would have.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentwire_fast.serving.graphs import GraphMemory, recover_from_failed_capture

Inputs = tuple[Tensor, ...]
Call = Callable[[Inputs], Any]

# Below this the launch is what events would measure.
GRAPH_BELOW_SECONDS = 20e-6
ROTATE_L2 = 5
GRAPH_CALLS = 200
# Calls before recording, on the same stream: to compile, and to keep what frozen weights give.
WARM_COPIES = 50
# Written before each call; L2 is 50 MB on an H100 and 60 MB on an H200.
FLUSH_BYTES = 256 * 2**20
# Two milliseconds on the GPU, in which Python gets ahead: what is timed was queued before.
# Our longest call, the projection's forward and backward, takes half a millisecond to launch.
HEAD_START_CYCLES = 4_000_000
ROUNDS = (10, 100)


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, 20th, 50th and 80th percentile, and how they were measured."""

    method: str
    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, method: str, seconds: Sequence[float]) -> Timing:
        quantiles = torch.tensor(seconds, dtype=torch.float64).quantile(
            torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
        )
        return cls(method, *quantiles.tolist())


def make_ready(call: Call, inputs: Inputs) -> None:
    """Prepare the inputs of a call that overwrites them and therefore has a method `before`.

    Not timed, nor counted.
    """
    before = getattr(call, "before", None)
    if before is not None:
        before(inputs)


def copies_for(inputs: Inputs, *, traffic: float, l2_bytes: int) -> list[Inputs]:
    """Copies of the inputs, the original first; together they move `ROTATE_L2` times the cache."""
    count = max(1, -int(-ROTATE_L2 * l2_bytes // max(traffic, 1)))
    copies = [
        tuple(t.detach().clone().requires_grad_(t.requires_grad) for t in inputs)
        for _ in range(count - 1)
    ]
    return [inputs, *copies]


def _passes(copies: Sequence[Inputs]) -> int:
    """Passes over the copies in one graph: enough that starting its replay does not count."""
    return -(-GRAPH_CALLS // len(copies))


def rounds_for(seconds_of_one: float, *, budget: float) -> int:
    """Rounds that fit the budget, within reason."""
    least, most = ROUNDS
    return max(least, min(most, int(budget / max(seconds_of_one, 1e-9))))


class CpuClock:
    """Wall-clock time of calls on the CPU, or of calls whose launching is what is asked about."""

    method = "wall clock"

    def __init__(self, *, synchronize: Callable[[], object] = lambda: None) -> None:
        self._synchronize = synchronize

    def times(
        self, calls: Mapping[str, Call], inputs: Inputs, *, budget: float
    ) -> dict[str, Timing]:
        """Every call on the same inputs, interleaved."""
        started = time.perf_counter()
        for call in calls.values():
            self._once(call, inputs)
        rounds = rounds_for(time.perf_counter() - started, budget=budget)
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                seconds[name].append(self._once(call, inputs))
        return {name: Timing.of(self.method, taken) for name, taken in seconds.items()}

    def _once(self, call: Call, inputs: Inputs) -> float:
        make_ready(call, inputs)
        self._synchronize()
        started = time.perf_counter()
        call(inputs)
        self._synchronize()
        return time.perf_counter() - started


class EventClock:
    """GPU time of calls by events: L2 flushed, launches queued ahead."""

    method = "events"

    def __init__(self, device: str = "cuda", *, flush_bytes: int = FLUSH_BYTES) -> None:
        self._flush = torch.empty(flush_bytes, dtype=torch.uint8, device=device)

    def times(
        self, calls: Mapping[str, Call], inputs: Inputs, *, budget: float
    ) -> dict[str, Timing]:
        """Every call on the same inputs, interleaved."""
        for call in calls.values():  # a first call compiles
            self._once(call, inputs)
        estimate = sum(self._seconds([self._once(c, inputs) for c in calls.values()]))
        rounds = rounds_for(estimate, budget=budget)
        marks: dict[str, list[Any]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                marks[name].append(self._once(call, inputs))
        return {name: Timing.of(self.method, self._seconds(m)) for name, m in marks.items()}

    def _once(self, call: Call, inputs: Inputs) -> tuple[Any, Any]:
        make_ready(call, inputs)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        torch.cuda._sleep(HEAD_START_CYCLES)
        start.record()
        call(inputs)
        end.record()
        return start, end

    @staticmethod
    def _seconds(marks: Sequence[tuple[Any, Any]]) -> list[float]:
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in marks]


class GraphClock:
    """GPU time per call of replayed graphs, each over all copies of the inputs."""

    method = "graph replay"

    def __init__(self, *, traffic: float, l2_bytes: int) -> None:
        self._traffic, self._l2_bytes = traffic, l2_bytes

    def times(
        self, calls: Mapping[str, Call], inputs: Inputs, *, budget: float
    ) -> dict[str, Timing]:
        """Every call, interleaved; one that cannot be recorded into a graph is left out."""
        copies = copies_for(inputs, traffic=self._traffic, l2_bytes=self._l2_bytes)
        graphs = {}
        for name, call in calls.items():
            try:
                graphs[name] = self._record(call, copies)
            except RuntimeError as error:
                print(f"    {name}: not recorded into a graph ({first_line(error)})")
        estimate = sum(self._once(graph) for graph, _ in graphs.values())
        rounds = rounds_for(estimate, budget=budget)
        recorded = len(copies) * _passes(copies)
        seconds: dict[str, list[float]] = {name: [] for name in graphs}
        for _ in range(rounds):
            for name, (graph, _) in graphs.items():
                seconds[name].append(self._once(graph) / recorded)
        return {name: Timing.of(self.method, taken) for name, taken in seconds.items()}

    @staticmethod
    def _record(call: Call, copies: list[Inputs]) -> tuple[Any, Any]:
        """The graph and its outputs, kept so that no call writes where another just did."""
        if hasattr(call, "before"):
            raise RuntimeError("a graph cannot make its inputs anew")
        memory = GraphMemory(torch.device("cuda", torch.cuda.current_device()))
        side = memory.stream
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for inputs in copies[:WARM_COPIES]:
                call(inputs)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        outputs: deque[Any] = deque(maxlen=len(copies))
        # A call that cannot be captured must not spoil the capture of the next.
        with (
            recover_from_failed_capture(memory),
            torch.cuda.graph(graph, pool=memory.pool, stream=side),
        ):
            for inputs in copies * _passes(copies):
                outputs.append(call(inputs))
        return graph, outputs

    @staticmethod
    def _once(graph: Any) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3


def first_line(error: Exception) -> str:
    """The first line of an error's message; the name of its class if that is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def peak_bytes(call: Call, inputs: Inputs) -> int:
    """Device memory that a call needs at its peak beyond what was allocated before it."""
    make_ready(call, inputs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(inputs)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def launches(call: Call, inputs: Inputs) -> int | None:
    """Kernels, copies and fills that one call starts on the GPU; None where none can be traced."""
    from torch.profiler import ProfilerActivity, profile

    make_ready(call, inputs)
    torch.cuda.synchronize()
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            call(inputs)
            torch.cuda.synchronize()
    except (RuntimeError, AssertionError):  # a machine that does not let its counters be read
        return None
    on_gpu = torch.autograd.DeviceType.CUDA
    return sum(event.device_type == on_gpu for event in found.events()) or None
