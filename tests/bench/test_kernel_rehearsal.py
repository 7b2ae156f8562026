"""A rehearsal of the kernels' first run on a GPU: the real plan, with a clock of its own."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bench.kernels import gpu_kernels, harness
from bench.kernels.ceilings import REACHABLE
from bench.kernels.harness import AUTOTUNED, COMPILED, Case
from bench.kernels.records import Record
from bench.processes import OK

H200 = REACHABLE["H200"]
# Seconds until a row is ready, most of them of a compiler; and of a case's gate and its timing.
READY = {COMPILED: 4.0, AUTOTUNED: 20.0, "liger": 1.0, "bitsandbytes": 1.0}
OURS = {"K1": 0.5, "K2": 2.0, "K3": 1.0, "K4": 0.0}  # half a second for each Triton kernel
MEASURED = 2.0
# Of a worker's start, and of the sections before the benchmarks.
STARTS, BEFORE = 10.0, {"ceilings": 5.0, "extension": 40.0, "tests": 60.0}


class World:
    """Time that passes only where something is compiled or measured; compilers are `slower`."""

    def __init__(self, slower: float) -> None:
        self.now, self.slower = 1000.0, slower

    def monotonic(self) -> float:
        return self.now

    def run_case(self, case: Case, *, ceilings: Any, rows: tuple[str, ...]) -> list[Record]:
        ready = OURS[case.kernel] + sum(READY.get(row, 0.0) for row in rows)
        self.now += self.slower * ready + MEASURED
        work = (case.work.traffic, case.work.flops, ceilings.floor(case.work))
        nothing = (None, {}, None, None, None, None)
        return [
            Record(case.kernel, case.name, case.shape, row, "cuda", *work, *nothing) for row in rows
        ]

    def section(self, name: str, run: gpu_kernels.Run, limit: float) -> str:
        return self.worker(run, name, limit)

    def worker(self, run: gpu_kernels.Run, name: str, limit: float) -> str:
        """A section; like a real one, it is ended where it takes longer than it may."""
        started = self.now
        if name in BEFORE:
            self.now += min(BEFORE[name] * self.slower, limit)
            run.results["ceilings"] = H200.to_json()
            return OK
        self.now += STARTS
        harness.run_cases(
            gpu_kernels.cases_of(name, gpu=True),
            ceilings=H200,
            seconds=limit - gpu_kernels.MARGIN_SECONDS - STARTS,
            keep=lambda found: run.results["records"].extend(r.to_json() for r in found),
        )
        if self.now > started + limit:
            self.now = started + limit
            return "stopped: out of time"
        return OK


@pytest.mark.parametrize("slower", [1.0, 3.0])
def test_the_first_run_yields_every_table(
    slower: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where compilers take three times as long as predicted: then rows of torch.compile are
    left out, and no case of ours."""
    world = World(slower)
    for module in (gpu_kernels, harness):
        monkeypatch.setattr(module, "time", world)
    monkeypatch.setattr(harness, "run_case", world.run_case)
    monkeypatch.setattr(harness, "describe", lambda record: "")
    monkeypatch.setattr(gpu_kernels, "run_worker", world.worker)
    for name, section in (("build_extension", "extension"), ("test_kernels", "tests")):
        monkeypatch.setattr(gpu_kernels, name, partial(world.section, section))
    written: list[gpu_kernels.Run] = []
    monkeypatch.setattr(gpu_kernels.Run, "write", lambda run: written.append(run))
    (tmp_path / "results.md").write_text("")
    gpu_kernels.run_all(tmp_path, tiny=False, commit=None, seconds=gpu_kernels.TOTAL_SECONDS)
    results = written[-1].results
    assert {s["outcome"] for s in results["sections"]} == {OK}
    assert [s["name"] for s in results["sections"]] == list(gpu_kernels.SHARES)
    found = {(r["kernel"], r["name"], tuple(r["shape"]), r["row"]) for r in results["records"]}
    for name in gpu_kernels.BENCHMARKS:
        for case in gpu_kernels.cases_of(name, gpu=True):
            for row in set(case.rows) - {COMPILED, AUTOTUNED}:
                assert (case.kernel, case.name, case.shape, row) in found
    assert world.now - 1000.0 < gpu_kernels.TOTAL_SECONDS
    compiled = {kernel for kernel, _, _, row in found if row == COMPILED}
    assert slower > 1 or compiled == {"K1", "K2", "K3"}
