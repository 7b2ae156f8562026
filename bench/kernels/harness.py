"""The frame of the kernels' benchmarks: cases, their rows, the gate on correctness, the records.

A case is one operation at one shape; its rows are ways to compute it: `ours`, `eager` torch,
`torch.compile`, other libraries. A row is timed only after its result passed the gate against fp64
in the same run, and all rows of a case are timed together, interleaved. On a CPU the same code runs
at small shapes, which tests the harness and says nothing about the kernels.
"""

from __future__ import annotations

import gc
import importlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, lru_cache
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from bench.kernels.ceilings import Ceilings, Stage, measure_ceilings
from bench.kernels.clocks import (
    GRAPH_BELOW_SECONDS,
    Call,
    CpuClock,
    EventClock,
    GraphClock,
    Inputs,
    Timing,
    first_line,
    launches,
    make_ready,
    peak_bytes,
)
from bench.kernels.records import Errors, Record, describe

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# torch.compile takes seconds a row: compared where it counts.
COMPILES = DEVICE == "cuda"
# A result may be this much further from fp64 than eager torch's in the same dtype.
EPSILON = {torch.float32: 5e-4, torch.float16: 1e-3, torch.bfloat16: 1e-2}
# Seconds for which one case is timed.
TIMING_BUDGET = 0.6
COMPILED, AUTOTUNED = "compile", "max-autotune"
# Seconds that a case without those two may take until some have been measured, and that compiling
# them may take.
PLAIN_SECONDS, COMPILE_SECONDS = 8.0, {COMPILED: 15.0, AUTOTUNED: 30.0}

Forward = Callable[..., Any]


class Absent(Exception):
    """The reason why a row has no figures."""


@dataclass(frozen=True)
class Row:
    """One way to compute a case.

    Attributes:
        prepare: makes the call, importing or compiling what it takes; raises Absent.
        limits: largest errors by name, beyond which the row is not timed; what is not named may
            exceed eager's by EPSILON.
        errors: in place of the case's, for a row whose result is another kind of thing.
    """

    prepare: Callable[[], Call]
    limits: Mapping[str, float] = field(default_factory=dict)
    errors: Callable[[Any, Inputs, Any], Errors] | None = None


@dataclass(frozen=True, eq=False)
class Case:
    """One operation at one shape.

    Attributes:
        kernel: K1 to K4; name: the operation; shape: its sizes; dtype: of what it works on.
        work: what it cannot do without, which sets its floor.
        design: the launches of our implementation, which predict its time.
        inputs: makes them; truth: the correct result, fp64; errors: of a result, by name.
        rows: by name; `eager` comes before those that are held to its errors.
        part: cases of one part get their autotuned rows before the next part's get any.
        wall: time the calls with their launching, as a caller waits for them.
    """

    kernel: str
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    work: Stage
    design: tuple[Stage, ...]
    inputs: Callable[[], Inputs]
    truth: Callable[[Inputs], Any]
    errors: Callable[[Any, Inputs, Any], Errors]
    rows: Mapping[str, Row]
    wall: bool = False
    part: str = ""

    def __str__(self) -> str:
        return f"{self.kernel} {self.name} {self.shape}"

    def predicted(self, ceilings: Ceilings) -> float:
        """Seconds that our design should take: its launches, one after the other."""
        return sum(ceilings.floor(stage) for stage in self.design)


def dtype_of(gpu: bool) -> torch.dtype:
    """The dtype that is benchmarked: bf16 on a GPU, fp32 on a CPU."""
    return torch.bfloat16 if gpu else torch.float32


def compiled(forward: Forward, *, mode: str | None = None) -> Forward:
    """`torch.compile` of the eager row; a graph break is an error, not a slower row."""
    if not COMPILES:
        raise Absent("compiled on a GPU only")
    # Without cudagraphs: the clock makes its own, for every row.
    mode = "max-autotune-no-cudagraphs" if mode == AUTOTUNED else mode
    return torch.compile(forward, mode=mode, fullgraph=True, dynamic=False)


def library(name: str) -> Any:
    """A module of another library, imported."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Absent(f"{name.partition('.')[0]} is not installed") from error


def relative_error(found: Tensor, truth: Tensor) -> float:
    """The largest error, as a share of the largest true value."""
    scale = truth.abs().max().clamp(min=1e-30)
    return ((found.to(truth.dtype) - truth).abs().max() / scale).item()


def distance(found: Tensor, truth: Tensor) -> float:
    """The norm of the error, as a share of the norm of the truth."""
    return ((found.to(truth.dtype) - truth).norm() / truth.norm().clamp(min=1e-30)).item()


def run_case(
    case: Case,
    *,
    ceilings: Ceilings,
    rows: tuple[str, ...] | None = None,
    budget: float = TIMING_BUDGET,
) -> list[Record]:
    """Gate, measure and time the named rows of a case (all of them by default).

    Besides them `eager` is computed, which errors are held to, and `ours` is timed, which times
    are.

    Args:
        budget: seconds of timing.
    """
    torch.manual_seed(0)
    if COMPILES:
        torch._dynamo.reset()  # compiled for this case, not recompiled from the last one's
    wanted = tuple(case.rows) if rows is None else rows
    timed = {"ours", *wanted}
    inputs = case.inputs()
    truth = case.truth(inputs)
    calls: dict[str, Call] = {}
    errors: dict[str, Errors] = {}
    absent: dict[str, str] = {}
    for name in ("eager", *sorted(timed - {"eager"})):
        with _noted(absent, name):
            call = case.rows[name].prepare()
            errors[name] = _gate(case, name, call, inputs, truth, errors.get("eager", {}))
            if name in timed:
                calls[name] = call
    del truth
    timings: dict[str, Timing] = {}
    with _noted(absent, *calls):  # they run interleaved: what fails there could be any one's
        timings = _timings(case, calls, inputs, ceilings, budget)
    memory: dict[str, int] = {}
    started: dict[str, int | None] = {}
    for name, call in calls.items() if DEVICE == "cuda" else ():
        with _noted(absent, name):
            memory[name] = peak_bytes(call, inputs)
            if name == "ours":  # tracing takes as long as the timing does
                started[name] = launches(call, inputs)
    records = []
    for name in wanted:
        timing, ours = timings.get(name), timings.get("ours")
        comparable = timing is not None and ours is not None and timing.method == ours.method
        records.append(
            Record(
                *(case.kernel, case.name, case.shape, name, DEVICE),
                traffic=case.work.traffic,
                flops=case.work.flops,
                floor=ceilings.floor(case.work),
                absent=absent.get(name),
                errors=errors.get(name, {}),
                timing=timing,
                against_ours=timing.p50 / ours.p50 if comparable else None,
                peak_bytes=memory.get(name),
                launches=started.get(name),
            )
        )
    del calls, inputs
    _release()
    return records


@contextmanager
def _noted(absent: dict[str, str], *names: str) -> Iterator[None]:
    """Note why rows have no figures if they fail inside: one row's failure is not the others'."""
    try:
        yield
    except Absent as reason:
        absent |= dict.fromkeys(names, str(reason))
    except torch.OutOfMemoryError:
        absent |= dict.fromkeys(names, "out of memory")
        torch.cuda.empty_cache()
    except Exception as error:
        reason = f"failed: {type(error).__name__}: {first_line(error)}"
        absent |= dict.fromkeys(names, reason)


def _gate(case: Case, name: str, call: Call, inputs: Inputs, truth: Any, eager: Errors) -> Errors:
    """The errors of a row's result; raises Absent where one is over its limit."""
    row = case.rows[name]
    make_ready(call, inputs)
    errors = (row.errors or case.errors)(call(inputs), inputs, truth)
    for what, error in errors.items():
        limit = row.limits.get(what, eager.get(what, 0.0) + EPSILON[case.dtype])
        if not error <= limit:  # NaN does not pass
            raise Absent(f"wrong: error of {what} {error:.1e}, over {limit:.1e}")
    return errors


def _timings(
    case: Case,
    calls: Mapping[str, Call],
    inputs: Inputs,
    ceilings: Ceilings,
    budget: float,
) -> dict[str, Timing]:
    if DEVICE == "cpu":
        return CpuClock().times(calls, inputs, budget=budget)
    if case.wall:
        return CpuClock(synchronize=torch.cuda.synchronize).times(calls, inputs, budget=budget)
    timings: dict[str, Timing] = {}
    if ceilings.floor(case.work) < GRAPH_BELOW_SECONDS:
        clock = GraphClock(traffic=case.work.traffic, l2_bytes=ceilings.l2_bytes)
        timings = clock.times(calls, inputs, budget=budget)
    rest = {name: call for name, call in calls.items() if name not in timings}
    return {**timings, **(EventClock().times(rest, inputs, budget=budget) if rest else {})}


def _release() -> None:
    if DEVICE == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


# --- pytest ---------------------------------------------------------------------------------------


def grid(cases: list[Case]) -> dict[str, Any]:
    """Arguments of `parametrize`: every row of every case, a case's rows next to each other."""
    pairs = [(case, row) for case in cases for row in case.rows]
    return {
        "argnames": ("case", "row"),
        "argvalues": pairs,
        "ids": [f"{case}-{row}" for case, row in pairs],
    }


@cache
def _ceilings() -> Ceilings:
    return measure_ceilings(DEVICE)


@lru_cache(maxsize=1)
def _records(case: Case) -> dict[str, Record]:
    return {record.row: record for record in run_case(case, ceilings=_ceilings())}


def report_row(benchmark: Any, case: Case, row: str) -> None:
    """One row as a test: its record in `extra_info`, and a few rounds in pytest-benchmark's table.

    The rows of a case are measured together when the first of them is asked for. A row that is
    wrong fails; one whose library is missing is skipped.
    """
    import pytest

    record = _records(case)[row]
    if record.absent is not None:
        assert not record.absent.startswith(("wrong", "failed")), record.absent
        pytest.skip(record.absent)
    benchmark.group = str(case)
    benchmark.extra_info.update(record.to_json())
    inputs, call = case.inputs(), case.rows[row].prepare()

    def timed() -> None:
        call(inputs)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(timed, setup=lambda: make_ready(call, inputs), rounds=3, warmup_rounds=1)


def compile_cases(cases: list[Case], *, seconds: float) -> None:
    """Call every row that compiles something once, autotuned ones left out, so that it is on disk
    when another process measures it.

    Args:
        seconds: after which no further case is started.
    """
    deadline = time.monotonic() + seconds
    for case in cases:
        if time.monotonic() > deadline:
            break
        if COMPILES:
            torch._dynamo.reset()
        absent: dict[str, str] = {}
        inputs = case.inputs()
        for name in case.rows:
            if name not in ("eager", AUTOTUNED):
                with _noted(absent, name):
                    call = case.rows[name].prepare()
                    make_ready(call, inputs)
                    call(inputs)
                call = None
                _release()  # other processes need the memory
        for name, why in absent.items():
            print(f"{case}: {name}: {why}", flush=True)
        del inputs
        _release()


def run_cases(
    cases: list[Case],
    *,
    ceilings: Ceilings,
    seconds: float,
    keep: Callable[[list[Record]], None],
) -> None:
    """Every case within a budget, autotuned rows last in their part: finding their settings can
    take minutes. Rows that compile wait until the end where the others would get too little time.

    Args:
        ceilings: of this machine.
        seconds: after which no further case is started.
        keep: is given each case's records as soon as they exist.
    """
    deadline = time.monotonic() + seconds
    plan: deque[tuple[Case, tuple[str, ...]]] = deque()
    for _, group in groupby(cases, key=lambda case: case.part):
        part = list(group)
        plan += [(case, tuple(row for row in case.rows if row != AUTOTUNED)) for case in part]
        plan += [(case, (AUTOTUNED,)) for case in part if AUTOTUNED in case.rows]
    late: list[tuple[Case, tuple[str, ...]]] = []
    plain_seconds: list[float] = []
    while plan or late:
        if not plan:
            plan, late = deque(late), []
        case, rows = plan.popleft()
        to_come = ("ours" in rows) + sum("ours" in others for _, others in plan)
        each = sum(plain_seconds) / len(plain_seconds) if plain_seconds else PLAIN_SECONDS
        spare = deadline - time.monotonic() - each * to_come
        slow = tuple(row for row in rows if row in COMPILE_SECONDS and COMPILE_SECONDS[row] > spare)
        rows = tuple(row for row in rows if row not in slow)
        if slow and to_come:
            late.append((case, slow))
            slow = ()
        started = time.monotonic()
        if slow or started > deadline:
            print(f"{case}: {', '.join(rows + slow)}: not run, out of time", flush=True)
            continue
        if not rows:
            continue
        records = run_case(case, ceilings=ceilings, rows=rows)
        keep(records)
        if not COMPILE_SECONDS.keys() & set(rows):
            plain_seconds.append(time.monotonic() - started)
        for record in records:
            print(describe(record), flush=True)
