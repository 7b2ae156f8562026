"""The benchmarks' machinery: gates, clocks, records, tables, and the run on a GPU as far as a CPU
goes. Nothing here asserts a time."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
import weakref
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bench import gpu_tests, processes, wheels
from bench.kernels import (
    bench_both_losses,
    bench_cross_entropy,
    bench_distill,
    bench_projection,
    bench_quantize,
    clocks,
    gpu_kernels,
    harness,
    tables,
)
from bench.kernels.ceilings import DATASHEETS, REACHABLE, Stage, measure_ceilings
from bench.kernels.harness import AUTOTUNED, Absent, Case, Row, run_case
from bench.kernels.records import Record
from bench.kernels.targets import targets
from bench.prefill import gpu_prefill
from latentwire_fast.ops import projection_cache
from latentwire_fast.readers import kv_placement

BENCH = processes.ROOT / "bench"
H200 = DATASHEETS["H200"]
CASES = [case for name in gpu_kernels.BENCHMARKS for case in gpu_kernels.cases_of(name)]
on_cpu = pytest.mark.skipif(harness.DEVICE == "cuda", reason="the small shapes of a CPU")


def measured(case: Case) -> dict[str, Record]:
    return {r.row: r for r in run_case(case, ceilings=H200, budget=0.0)}


def case_of(**rows: Row) -> Case:
    """Doubling, with rows to be tested."""
    return Case(
        *("K1", "double", (8,), torch.float32, Stage(64.0), (Stage(64.0),)),
        inputs=lambda: (torch.arange(8.0),),
        truth=lambda inputs: 2 * inputs[0].double(),
        errors=lambda found, inputs, truth: {"values": harness.relative_error(found, truth)},
        rows=rows,
    )


def row_of(call: Callable[..., Any], **limits: float) -> Row:
    return Row(lambda: lambda inputs: call(*inputs), limits)


double = row_of(lambda x: 2 * x, values=1e-6)


# --- Cases ----------------------------------------------------------------------------------------


@on_cpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case_runs_and_is_right(case: Case) -> None:
    records = measured(case)
    assert set(records) == set(case.rows)
    for name in [name for name in records if name == "eager" or name.startswith("ours")]:
        if records[name].absent == "the C++ extension is not built":
            continue
        assert records[name].absent is None
        assert records[name].timing is not None
        assert records[name].against_ours is not None or records["ours"].timing is None
    for record in records.values():
        assert Record.from_json(json.loads(json.dumps(record.to_json()))) == record


@on_cpu
@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [c for c in CASES if "compile" in c.rows], ids=str
)  # fmt: skip
def test_compiled_rows_are_one_graph_and_right(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced as on a GPU, but run as traced: what the compiler would do takes seconds a row."""
    compile_ = torch.compile
    modes = []

    def traced(forward: Any, *, mode: str | None, **options: Any) -> Any:
        modes.append(mode)
        return compile_(forward, backend="eager", **options)

    monkeypatch.setattr(harness, "COMPILES", True)
    monkeypatch.setattr(torch, "compile", traced)
    records = measured(case)
    assert records["compile"].absent is None
    assert records[AUTOTUNED].absent is None
    assert modes == [None, "max-autotune-no-cudagraphs"]


class LigerKLDIVLoss(torch.nn.Module):
    """As liger-kernel 0.8.5 has it: log-probabilities in, the mean over rows out."""

    def __init__(self, reduction: str = "batchmean", log_target: bool = False) -> None:
        super().__init__()
        self.options: dict[str, Any] = {"reduction": reduction, "log_target": log_target}

    def forward(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        return F.kl_div(log_q, log_p, **self.options)


class LigerFusedLinearJSD(torch.nn.Module):
    """Likewise: labels are an argument without a default; no tau squared."""

    def __init__(
        self, jsd_beta: float = 0.5, ignore_index: int = -100, temperature: float = 1.0
    ) -> None:
        super().__init__()
        assert jsd_beta == 0
        self.temperature = temperature

    def forward(
        self, student: Tensor, head: Tensor, teacher: Tensor, other: Tensor, labels: Tensor | None
    ) -> Tensor:
        log_q, log_p = (
            torch.log_softmax(h @ w.T / self.temperature, -1)
            for h, w in ((student, head), (teacher, other))
        )
        return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


class LigerFusedLinearCrossEntropyLoss(torch.nn.Module):
    """Likewise: the head comes first."""

    def forward(self, head: Tensor, hidden: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(hidden @ head.T, labels)


LIGER = (LigerKLDIVLoss, LigerFusedLinearJSD, LigerFusedLinearCrossEntropyLoss)


@on_cpu
@pytest.mark.parametrize(
    "make",
    [
        *(bench_distill.logits_cases, bench_distill.hidden_cases),
        *(bench_cross_entropy.cases, bench_both_losses.cases),
    ],
)
def test_liger_rows_compute_the_same_loss(
    make: Callable[[], list[Case]], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("liger_kernel.transformers")
    vars(module).update({loss.__name__: loss for loss in LIGER})
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    record = measured(make()[0])["liger"]
    assert record.absent is None
    assert set(record.errors) == {"loss", "gradient"}


@on_cpu
def test_bitsandbytes_rows_are_held_to_their_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """With steps of amax / 6 a reconstruction is within FP4's widest half gap; of amax / 2, not."""
    steps = 6.0

    def quantize_4bit(z: Tensor, *, blocksize: int, quant_type: str) -> tuple[Tensor, Any]:
        assert quant_type == "fp4"
        blocks = z.view(-1, blocksize)
        step = blocks.abs().amax(1, keepdim=True) / steps
        return (blocks / step).round(), SimpleNamespace(step=step, shape=z.shape)

    module = ModuleType("bitsandbytes.functional")
    vars(module).update(
        quantize_4bit=quantize_4bit,
        dequantize_4bit=lambda codes, state: (codes * state.step).view(state.shape),
    )
    monkeypatch.setitem(sys.modules, "bitsandbytes", ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    pack, unpack = (make(bench_quantize.SMALL, 4, torch.float32)
                    for make in (bench_quantize.pack_case, bench_quantize.unpack_case))  # fmt: skip
    assert measured(pack)["bitsandbytes"].timing is not None
    assert measured(unpack)["bitsandbytes"].timing is not None
    steps = 2.0
    assert "wrong: error of values" in str(measured(pack)["bitsandbytes"].absent)


def test_large_cases_are_made_without_memory() -> None:
    """Describing the shapes of a GPU allocates nothing; a design never beats the work's floor."""
    names = sorted(gpu_kernels.BENCHMARKS)
    cases = [c for name in names for c in gpu_kernels.cases_of(name, gpu=True)]
    assert len({str(case) for case in cases}) == len(cases)
    for case in cases:
        for name, datasheet in DATASHEETS.items():
            assert case.predicted(REACHABLE[name]) >= datasheet.floor(case.work)
    page = tables.prediction_table(cases)
    assert page.count("\n") == len(cases) + 1
    documents = (processes.ROOT / "docs" / "kernels.md").read_text()
    assert page in documents, (
        "write anew what `python -m bench.kernels.gpu_kernels --predict` prints"
    )


# --- The gate -------------------------------------------------------------------------------------


def fails() -> Any:
    raise ValueError("two\nlines")


def missing() -> Any:
    return harness.library("no_such_library.at_all")


@on_cpu
@pytest.mark.parametrize(
    ("ours", "reason"),
    [
        (row_of(lambda x: 2 * x + 1), "wrong: error of values 7.1e-02, over 5.0e-04"),
        (row_of(lambda x: x * torch.nan), "wrong: error of values nan, over 5.0e-04"),
        (row_of(lambda x: fails()), "failed: ValueError: two"),
        (Row(missing), "no_such_library is not installed"),
        (row_of(lambda x: 2 * x * (1 + 2e-4)), None),
        (row_of(lambda x: 2 * x * (1 + 2e-4), values=1e-5), "wrong: error of values 2.0e-04"),
    ],
)
def test_only_right_results_are_timed(ours: Row, reason: str | None) -> None:
    records = measured(case_of(ours=ours, eager=double))
    assert records["eager"].timing is not None
    if reason is None:
        assert records["ours"].absent is None
        assert records["ours"].timing is not None
        return
    assert str(records["ours"].absent).startswith(reason)
    assert records["ours"].timing is None
    assert records["eager"].against_ours is None


@on_cpu
def test_a_wrong_row_fails_its_benchmark_and_a_missing_library_skips_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(harness, "_ceilings", lambda: H200)
    case = case_of(ours=row_of(lambda x: x), eager=double, other=Row(missing))
    benchmark = SimpleNamespace(extra_info={}, pedantic=lambda call, **options: call())
    harness.report_row(benchmark, case, "eager")
    assert benchmark.extra_info["row"] == "eager"
    with pytest.raises(AssertionError, match="wrong: error of values"):
        harness.report_row(benchmark, case, "ours")
    with pytest.raises(pytest.skip.Exception, match="not installed"):
        harness.report_row(benchmark, case, "other")


@on_cpu
def test_cases_stop_at_the_deadline_and_tuned_rows_come_last() -> None:
    rows = {"ours": double, "eager": double, AUTOTUNED: double}
    kept: list[list[str]] = []

    def keep(records: list[Record]) -> None:
        kept.append([record.row for record in records])

    two = [case_of(**rows), case_of(ours=double, eager=double)]
    harness.run_cases(two, ceilings=H200, seconds=-1, keep=keep)
    assert kept == []
    harness.run_cases(two, ceilings=H200, seconds=600, keep=keep)
    assert kept == [["ours", "eager"], ["ours", "eager"], [AUTOTUNED]]
    kept.clear()
    harness.run_cases(
        [replace(two[0], part="a"), replace(two[0], part="b")],
        ceilings=H200,
        seconds=600,
        keep=keep,
    )
    assert kept == [["ours", "eager"], [AUTOTUNED]] * 2


def test_what_fails_after_the_gate_is_noted_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error while the rows are timed is theirs, and ends no other case."""

    def fail(*_: Any) -> Any:
        raise RuntimeError("illegal address")

    monkeypatch.setattr(harness, "_timings", fail)
    records = measured(case_of(ours=double, eager=double))
    assert {r.absent for r in records.values()} == {"failed: RuntimeError: illegal address"}
    assert {r.timing for r in records.values()} == {None}


# --- Clocks, with a GPU that only counts ----------------------------------------------------------


class FakeGpu:
    """Stands in for torch.cuda: every call that is not recorded takes a millisecond of its time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.repaired = 0
        gpu = self

        class Event:
            def __init__(self, *, enable_timing: bool = False) -> None:
                self.at = math.nan

            def record(self) -> None:
                self.at = gpu.now

            def elapsed_time(self, end: Event) -> float:
                return end.at - self.at

        class Graph:
            calls = 0

            def replay(self) -> None:
                gpu.now += self.calls

        class Recording:
            def __init__(self, graph: Graph, pool: int, stream: Stream) -> None:
                self.graph = graph

            def __enter__(self) -> None:
                self.started = gpu.now

            def __exit__(self, *error: object) -> None:
                self.graph.calls, gpu.now = int(gpu.now - self.started), self.started

        class Stream:
            device_index = 0

            def __init__(self, device: torch.device | None = None) -> None: ...

            def wait_stream(self, other: Stream) -> None:
                assert isinstance(other, Stream)

            def __enter__(self) -> None: ...

            def __exit__(self, *error: object) -> None: ...

        class Generator:
            def clone_state(self) -> Generator:
                return self

            def graphsafe_set_state(self, state: Generator) -> None:
                gpu.repaired += 1

        fakes = {
            "Event": Event,
            "CUDAGraph": Graph,
            "graph": Recording,
            "Stream": Stream,
            "stream": lambda stream: stream,
            "current_stream": Stream,
            "synchronize": lambda: None,
            "current_device": lambda: 0,
            "graph_pool_handle": lambda: 0,
            "set_stream": lambda stream: None,
            "default_generators": [Generator()],
            "_sleep": lambda cycles: None,
            "reset_peak_memory_stats": lambda: None,
            "memory_allocated": lambda: 7,
            "max_memory_allocated": lambda: 107,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *_: None, raising=False)

    def work(self, milliseconds: float) -> Callable[[Any], Any]:
        def call(inputs: Any) -> Any:
            self.now += milliseconds
            return inputs

        return call


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    return FakeGpu(monkeypatch)


def test_events_time_every_call_alone(gpu: FakeGpu) -> None:
    clock = clocks.EventClock("cpu", flush_bytes=16)
    found = clock.times({"a": gpu.work(3), "b": gpu.work(5)}, (), budget=0.0)
    assert found["a"] == clocks.Timing("events", 3e-3, 3e-3, 3e-3)
    assert found["b"].p50 == pytest.approx(5e-3)


def test_what_a_call_needs_before_it_is_not_timed(gpu: FakeGpu) -> None:
    class UsesUp:
        ready = 0

        def before(self, inputs: Any) -> None:
            self.ready += 1
            gpu.now += 7

        def __call__(self, inputs: Any) -> None:
            self.ready -= 1
            assert self.ready == 0
            gpu.now += 2

    call = UsesUp()
    found = clocks.EventClock("cpu", flush_bytes=16).times({"a": call}, (), budget=0.0)
    assert found["a"].p50 == pytest.approx(2e-3)
    assert clocks.peak_bytes(call, ()) == 100
    assert clocks.GraphClock(traffic=1, l2_bytes=1).times({"a": call}, (), budget=0.0) == {}
    clocks.CpuClock().times({"a": call}, (), budget=0.0)


def test_graphs_time_calls_over_copies_larger_than_the_cache(gpu: FakeGpu) -> None:
    inputs = (torch.ones(4, requires_grad=True), torch.ones(2))
    clock = clocks.GraphClock(traffic=1000, l2_bytes=10_000)
    copies = clocks.copies_for(inputs, traffic=1000, l2_bytes=10_000)
    assert len(copies) == 50
    assert copies[0] is inputs
    assert len({t.data_ptr() for pair in copies for t in pair}) == 100
    assert [t.requires_grad for t in copies[-1]] == [True, False]

    called = []

    def unrecordable(inputs: Any) -> Any:
        called.append(inputs)
        if len(called) > clocks.WARM_COPIES:  # the calls before the capture succeed
            raise RuntimeError("operation not permitted when stream is capturing")
        return inputs

    found = clock.times({"a": gpu.work(2), "b": unrecordable}, inputs, budget=0.0)
    assert set(found) == {"a"}
    assert found["a"].p50 == pytest.approx(2e-3)
    assert gpu.repaired == 1  # or the next capture would fail too


@on_cpu
@pytest.mark.parametrize(
    ("traffic", "wall", "method"),
    [(1e7, False, "graph replay"), (1e9, False, "events"), (1e7, True, "wall clock")],
)
def test_a_case_on_a_gpu_is_timed_by_what_suits_its_length(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, traffic: float, wall: bool, method: str
) -> None:
    def timed(milliseconds: float) -> Row:
        def call(x: Tensor) -> Tensor:
            gpu.now += milliseconds
            return 2 * x

        return row_of(call, values=1e-6)

    monkeypatch.setattr(harness, "DEVICE", "cuda")
    monkeypatch.setattr(harness, "EventClock", lambda: clocks.EventClock("cpu", flush_bytes=16))
    monkeypatch.setattr(harness, "launches", lambda call, inputs: 3)
    case = case_of(ours=timed(2), eager=timed(5))
    records = measured(replace(case, work=Stage(traffic), wall=wall))
    assert {r.timing.method for r in records.values() if r.timing} == {method}
    assert {r.peak_bytes for r in records.values()} == {100}
    assert {name: r.launches for name, r in records.items()} == {"ours": 3, "eager": None}
    if not wall:
        assert records["eager"].against_ours == pytest.approx(2.5)


@on_cpu
def test_a_row_that_no_graph_records_is_not_compared(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    def waits(x: Tensor) -> Tensor:
        if recording:
            raise RuntimeError("operation not permitted when stream is capturing")
        gpu.now += 1
        return 2 * x

    recording = False
    graph = torch.cuda.graph

    class Recording(graph):  # type: ignore[misc, valid-type]
        def __enter__(self) -> None:
            nonlocal recording
            recording = True
            super().__enter__()

        def __exit__(self, *error: object) -> None:
            nonlocal recording
            recording = False
            super().__exit__(*error)

    monkeypatch.setattr(torch.cuda, "graph", Recording)
    monkeypatch.setattr(harness, "DEVICE", "cuda")
    monkeypatch.setattr(harness, "launches", lambda call, inputs: None)
    monkeypatch.setattr(harness, "EventClock", lambda: clocks.EventClock("cpu", flush_bytes=16))

    def records_well(x: Tensor) -> Tensor:
        gpu.now += 2
        return 2 * x

    rows = {"ours": row_of(records_well, values=1e-6), "eager": row_of(waits, values=1e-6)}
    case = case_of(**rows)
    records = measured(replace(case, work=Stage(1e7)))
    assert records["ours"].timing is not None
    assert records["ours"].timing.method == "graph replay"
    assert records["eager"].timing == clocks.Timing("events", 1e-3, 1e-3, 1e-3)
    assert records["eager"].against_ours is None


def test_rounds_and_percentiles() -> None:
    least, most = clocks.ROUNDS
    assert clocks.rounds_for(1e-9, budget=1.0) == most
    assert clocks.rounds_for(1.0, budget=0.0) == least
    timing = clocks.Timing.of("events", [0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    assert (timing.p20, timing.p50, timing.p80) == (1.0, 2.5, 4.0)


def test_peak_memory_is_what_the_call_adds(gpu: FakeGpu) -> None:
    assert clocks.peak_bytes(gpu.work(1), ()) == 100


def test_ceilings_of_this_machine() -> None:
    found = measure_ceilings("cpu")
    assert min(found.bytes_per_second, found.flops_per_second, found.link_bytes_per_second) > 0
    assert H200.floor(Stage(4.8e12)) == 1.0
    assert H200.floor(Stage(0, flops=2 * 989e12)) == 2.0
    assert H200.floor(Stage(0, launches=3)) == pytest.approx(6e-6)
    assert H200.floor(Stage(0, link=64e9)) == 1.0


# --- Targets and tables ---------------------------------------------------------------------------


def record(row: str, seconds: float | None, **fields: Any) -> Record:
    timing = None if seconds is None else clocks.Timing("events", seconds, seconds, seconds)
    known = Record(
        *("K3", "KL through the head, forward+backward", (4096, 4096, 128_256), row, "cuda"),
        *(1e9, 1e12, 1e-3),
        timing=timing,
    )
    return replace(known, **fields)


def verdicts(*records: Record) -> dict[str, dict[str, Any]]:
    return {v["what"]: v for v in (t.verdict(records) for t in targets(H200))}


def test_targets_are_met_missed_or_not_measured() -> None:
    ours = record("ours", 2e-3, peak_bytes=100, against_ours=1.0)
    eager = record("eager", 4e-3, peak_bytes=1000, against_ours=2.0)
    found = verdicts(ours, eager, replace(eager, shape=(1024, 8, 8), against_ours=1.4))
    through = "through the head: "
    assert found[through + "peak memory over eager's, N 4096"]["value"] == pytest.approx(0.1)
    assert found[through + "peak memory over eager's, N 4096"]["met"] is True
    assert found[through + "times faster than eager"]["met"] is True
    worse = verdicts(ours, replace(eager, against_ours=1.4))
    assert worse[through + "times faster than eager"]["met"] is False
    assert found[through + "times faster than Liger"]["met"] is None
    share = found[through + "share of the matmul floor"]
    assert share["value"] == pytest.approx(1e12 / 2e-3 / 989e12)
    assert share["met"] is False
    wrong = verdicts(replace(ours, timing=None, absent="wrong: error"), eager)
    assert wrong[through + "times faster than eager"]["met"] is False


def test_every_target_looks_at_cases_and_rows_that_exist() -> None:
    cases = [c for name in gpu_kernels.BENCHMARKS for c in gpu_kernels.cases_of(name, gpu=True)]
    records = [
        replace(
            record(row, 1e-3, against_ours=1.0, peak_bytes=1, launches=1),
            kernel=case.kernel, name=case.name, shape=case.shape,
        )
        for case in cases for row in case.rows
    ]  # fmt: skip
    found = [target.verdict(records) for target in targets(H200)]
    assert all(verdict["cases"] and verdict["met"] is not None for verdict in found)
    counts = {verdict["what"]: verdict["cases"] for verdict in found}
    assert counts["launches, paper size"] == 9
    assert counts["times faster than eager, forward"] == 3
    assert counts["from a payload: times faster than eager"] == 2
    assert counts["on logits: times faster than Liger"] == 3


def test_tables() -> None:
    assert [tables.seconds(s) for s in (2.0, 1.5e-3, 7e-6, None)] == ["2 s", "1.5 ms", "7 us", "-"]
    page = tables.record_tables([
        record("ours", 2e-3, errors={"loss": 1e-6}, peak_bytes=2**20, launches=4, against_ours=1.0),
        record("liger", None, absent="liger_kernel is not installed"),
        replace(record("ours", 1e-3), name="another"),
        record(AUTOTUNED, 3e-3, against_ours=1.5),
    ])  # fmt: skip
    assert page.count("## K3") == 1
    assert page.count("**KL through the head, forward+backward**") == 1
    assert "| ours | 2 ms | 2 ms to 2 ms | 500 GB/s, 500 TFLOP/s | 0.50 | 1 MiB | 4 |" in page
    assert "| liger | liger_kernel is not installed |" in page
    assert "1.50x |" in page
    widths = {line.count("|") for line in page.splitlines() if line.startswith("|")}
    assert widths == {len(tables.HEAD) + 1}


# --- The run on a GPU -----------------------------------------------------------------------------


@on_cpu
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_kernels.main([str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "gpu_kernels: it needs a CUDA device, and torch sees none\n"
    assert not (tmp_path / "out").exists()


def test_what_triton_needs_is_looked_for_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(processes.shutil, "which", lambda name: None)
    monkeypatch.setattr(processes.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.delenv("CPATH", raising=False)
    assert gpu_kernels.main([str(tmp_path / "out")]) == 2
    assert gpu_prefill.main([str(tmp_path / "out")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert ["no C compiler" in lines[0], f"no Python.h in {tmp_path}" in lines[1]] == [True, True]
    assert len(lines) == 4
    monkeypatch.setattr(processes.shutil, "which", lambda name: "/usr/bin/cc")
    (tmp_path / "Python.h").touch()
    monkeypatch.setenv("CPATH", str(tmp_path))
    assert not processes.missing_tools()


def test_wheels_in_a_folder_are_there_for_the_sections(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", "before")
    folder, target = tmp_path / "wheels", tmp_path / "packages"
    folder.mkdir()
    wheel(folder, "brought_along", "MARK = 7")
    (folder / "torn-1.0-py3-none-any.whl").write_bytes(b"no archive")
    wheels.offer(folder, target)
    assert "torn-1.0-py3-none-any.whl is left out" in capsys.readouterr().err
    found = [sys.executable, "-c", "import brought_along; raise SystemExit(brought_along.MARK)"]
    ending = processes.finish(processes.start(found), by=time.monotonic() + 60)
    assert ending == "failed: status 7"
    assert processes.environment()["PYTHONPATH"].split(os.pathsep).count(str(target)) == 1


def wheel(folder: Path, name: str, code: str) -> None:
    """A wheel of one module."""
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}.py", code)
        about = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        archive.writestr(f"{info}/METADATA", about)
        kind = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        archive.writestr(f"{info}/WHEEL", kind)
        archive.writestr(f"{info}/RECORD", "")


def test_a_process_that_hangs_is_ended_with_its_children() -> None:
    child = "import subprocess, time; subprocess.Popen(['sleep', '60']); time.sleep(60)"
    process = processes.start([sys.executable, "-c", child])
    ending = processes.finish(process, by=time.monotonic() + 1)
    assert ending == "stopped: out of time"
    assert processes.finish(processes.start(["false"]), by=math.inf).startswith("failed")


def test_a_build_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = processes.start
    failing = [sys.executable, "-c", "print('no compiler'); raise SystemExit(1)"]
    monkeypatch.setattr(processes, "start", lambda command, log: start(failing, log))
    why = processes.build_extension(tmp_path / "build.log", 60.0)
    # What was built before still loads.
    built = kv_placement.has_extension()
    assert why == (processes.OK if built else "not built (failed: status 1): no compiler")


@pytest.mark.parametrize(
    ("log", "ending", "expected"),
    [
        ("t.py::a PASSED [ 5%]\nt.py::b[x y] SKIPPED (why) [ 9%]", "done", (1, 0, 1, "", False)),
        ("t.py::a PASSED [ 5%]\nt.py::b FAILED [ 9%]", "failed: 1", (1, 1, 0, "t.py::b", True)),
        ("t.py::a PASSED", "stopped: out of time", (1, 0, 0, "stopped", True)),
        ("E   ModuleNotFoundError: No module named 'xyz.a'", "failed: 2",
         (0, 0, 0, "needs xyz.a", True)),
        ("", "failed: status 3", (0, 0, 0, "failed: status 3: no output", True)),
    ],
)  # fmt: skip
def test_what_pytest_said_is_counted(log: str, ending: str, expected: tuple[Any, ...]) -> None:
    report = gpu_tests.report_of("t.py", log, ending)
    passed, failed, skipped, note, bad = expected
    assert (report["passed"], report["failed"], report["skipped"]) == (passed, failed, skipped)
    assert report["note"].startswith(note)
    assert report["bad"] is bad


def test_a_file_may_lack_what_it_is_known_to_need() -> None:
    log = "E   ModuleNotFoundError: No module named 'accelerate.state'"
    assert gpu_tests.report_of("test_kernels_training.py", log, "failed: 2")["bad"] is False
    assert gpu_tests.report_of("test_kernels_projection.py", log, "failed: 2")["bad"] is True


def test_all_files_with_tests_for_a_gpu_are_found() -> None:
    kernels, others = gpu_tests.device_tests(tiny=False)
    names = {path.stem.removeprefix("test_kernels_") for path in kernels}
    assert {"quantization", "projection", "distillation"} <= names
    assert names.isdisjoint({"aot", "interpreted"})
    assert "test_kv_placement" in {path.stem for path in others}
    assert Path(__file__) not in {*kernels, *others}


def test_every_test_of_a_file_is_dealt_out_once() -> None:
    path = processes.ROOT / "tests" / "kernels" / "test_kernels_projection.py"
    hands = gpu_tests.dealt(path)
    assert len(hands) == gpu_tests.PROCESSES
    found = [test for hand in hands for test in hand]
    assert len(found) == len(set(found)) == path.read_text().count("\ndef test_")


def test_out_of_time_before_anything_is_written_down(tmp_path: Path) -> None:
    assert gpu_kernels.run_all(tmp_path, tiny=True, commit=None, seconds=0) == 1
    results = json.loads((tmp_path / "results.json").read_text())
    assert {s["outcome"] for s in results["sections"]} == {"not run: out of time"}
    assert "reachable" in results["ceilings"]["name"]
    assert "not run: out of time" in (tmp_path / "results.md").read_text()


# What the package's other parts need, and what the benchmarks compare with.
NOT_ON_A_BARE_MACHINE = (
    *("tyro", "datasets", "peft", "accelerate", "tensorboard", "matplotlib", "scipy", "brotli"),
    *("rouge_score", "hypothesis", "liger_kernel", "bitsandbytes"),
)


@pytest.mark.slow
def test_a_bare_machine_is_enough() -> None:
    """The benchmarks, and the tests of every kernel, import none of the packages left out."""
    modules = [f"bench.kernels.{name}" for name in ("gpu_kernels", "tables", "targets")]
    modules += ["latentwire_fast.evaluation.provenance"]
    modules += [
        f"bench.{path.parent.name}.{path.stem}" for path in sorted(BENCH.glob("*/bench_*.py"))
    ]
    modules += [f"test_kernels_{name}" for name in ("quantization", "projection", "distillation")]
    modules += ["readers", "test_kv_placement"]
    code = (
        f"import importlib, runpy, sys\ntests = {str(processes.ROOT / 'tests')!r}\n"
        "sys.path += [tests, f'{tests}/kernels', f'{tests}/readers']\n"
        f"for name in {NOT_ON_A_BARE_MACHINE}: sys.modules[name] = None\n"
        "runpy.run_path('tests/conftest.py')\n"
        f"for name in {modules}: importlib.import_module(name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=processes.environment(), cwd=processes.ROOT,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@on_cpu
@pytest.mark.slow
def test_the_whole_run_at_small_shapes(tmp_path: Path) -> None:
    """Every section in its own process, results written, written where the command says."""
    command = [sys.executable, "-m", "bench.kernels.gpu_kernels", tmp_path / "out", "--tiny"]
    command += ["--wheels", "none", "--commit", "1234567", "--seconds", "3000"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=processes.environment(),  # the checkout is importable from anywhere
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["about"]["commit"] == "1234567"
    names = [section["name"] for section in results["sections"]]
    assert names == ["ceilings", "extension", "tests", *gpu_kernels.BENCHMARKS]
    outcomes = {s["name"]: s["outcome"] for s in results["sections"]}
    assert {outcomes[name] for name in gpu_kernels.BENCHMARKS} == {"done"}
    found = {(r["kernel"], r["name"], r["row"]) for r in results["records"]}
    assert found == {(case.kernel, case.name, row) for case in CASES for row in case.rows}
    assert len(results["targets"]) == len(targets(H200))
    page = (tmp_path / "out" / "results.md").read_text()
    assert "## Targets" in page
    assert all(title in page for title in tables.TITLES.values())
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"logs", "results.json", "results.md"}


@on_cpu
@pytest.mark.slow
def test_pytest_collects_the_folder_once_and_tables_read_its_file(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "bench"]
    command += ["--benchmark-only", f"--benchmark-json={report}"]
    # pytest-benchmark times nothing in a process that says it is one of several.
    alone = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        command, cwd=processes.ROOT, env=alone, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(report.read_text())
    names = [entry["name"] for entry in content["benchmarks"]]
    assert len(names) == len(set(names)) >= 2 * len([c for c in CASES if c.kernel != "K4"])
    page = tables.benchmark_page(content)
    assert all(f"**{case.name}**" in page for case in CASES if case.kernel != "K4")


def test_adapter_rows_take_the_same_arguments() -> None:
    inputs = bench_projection.make_inputs(bench_projection.SMALL[0], torch.float32, backward=False)
    eager, ours = (f(*inputs[:-1]).cpu() for f in (bench_projection.eager, bench_projection.ours))
    torch.testing.assert_close(eager, ours, rtol=1e-3, atol=1e-5)


def test_an_absent_row_is_no_error() -> None:
    with pytest.raises(Absent, match="no_such_library is not installed"):
        missing()


def test_what_a_frozen_row_folded_outlives_another_fold() -> None:
    """A graph of the row reads it at each replay; the next row's calls fold the weight anew."""

    class Fold: ...

    weight = torch.ones(2)
    folds: list[weakref.ref[Fold]] = []

    def forward(x: torch.Tensor) -> torch.Tensor:
        fold = Fold()
        folds.append(weakref.ref(fold))
        projection_cache._folds[weight] = (None, None, fold)  # type: ignore[assignment]
        return x

    row = bench_projection.frozen(forward)
    row(weight)
    row(weight)
    assert [fold() is not None for fold in folds] == [True, True]
