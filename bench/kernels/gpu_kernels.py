"""The kernels on one GPU: ceilings, extension, tests, benchmarks, targets. Under nine minutes.

    python -m bench.kernels.gpu_kernels OUT           # writes results.json, results.md, logs
    python -m bench.kernels.gpu_kernels OUT --tiny    # on a CPU: tests the path, measures nothing
    python -m bench.kernels.gpu_kernels --predict     # floors and predicted times

Runs from a checkout that need not be installed, on torch, triton, transformers, numpy, pytest and
pytest-benchmark, with a C compiler and Python.h for Triton. Liger-Kernel and bitsandbytes are rows
of the tables where they are installed, or lie as wheels in the checkout's folder `wheels`.
Every section is a process of its own with a time limit, and what it found is written when it ends:
a kernel that crashes or hangs costs its own section.

Exit status: 0; 1 where a section or a test failed or our result was wrong; 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import processes
from bench.gpu_tests import run_tests
from bench.processes import FAILED, OK, ROOT, finish, ready, start

TOTAL_SECONDS = 520
# A worker stops starting cases this long before it would be killed.
MARGIN_SECONDS = 10
# The benchmarks' workers, and all sections in their order. Each gets its share of the time that is
# left, among those that are still to come: what one leaves over, the later ones have. Those with
# the most rows that compile come late, and K4, which has few rows, takes what is over.
# tests/bench/test_kernel_rehearsal.py holds the shares.
BENCHMARKS = {"K3a": 0.16, "K3b": 0.19, "K2": 0.25, "K1": 0.18, "K4": 0.05}
SHARES = {"ceilings": 0.09, "extension": 0.07, "tests": 0.24, **BENCHMARKS}
# Processes that compile a benchmark's cases while the tests run, on 16 cores.
COMPILERS = {"K3a": 1, "K3b": 2, "K2": 4, "K1": 4}


# When this process began: importing torch takes a worker some seconds.
_BEGAN = time.monotonic()


@dataclass
class Run:
    """The results so far, written after every section.

    Attributes:
        folder: where to; parts: the workers' files and the tests' logs.
        tiny: on a CPU, at small shapes.
        benchmarks: that are run.
        seconds: of the whole run, from now on.
        results: the content of results.json.
    """

    folder: Path
    parts: Path
    tiny: bool
    benchmarks: Sequence[str]
    commit: str | None
    seconds: float
    results: dict[str, Any]
    started: float = field(default_factory=lambda: time.monotonic())

    def left(self) -> float:
        return self.started + self.seconds - time.monotonic()

    def section(self, name: str, work: Callable[[float], str]) -> None:
        """One section within its share of the time that is left."""
        done = {section["name"] for section in self.results["sections"]}
        left_out = done | (BENCHMARKS.keys() - {*self.benchmarks})
        to_come = sum(share for other, share in SHARES.items() if other not in left_out)
        limit = self.left() * SHARES[name] / to_come
        if limit < MARGIN_SECONDS:
            outcome, taken = "not run: out of time", 0.0
        else:
            print(f"== {name}: at most {limit:.0f} s, {self.left():.0f} s left", flush=True)
            started = time.monotonic()
            outcome = work(limit)
            taken = time.monotonic() - started
        print(f"== {name}: {outcome}, {taken:.0f} s", flush=True)
        self.results["sections"].append({"name": name, "outcome": outcome, "seconds": taken})
        self.write()

    def write(self) -> None:
        """results.json and results.md, as far as they are known."""
        from bench.kernels.ceilings import Ceilings
        from bench.kernels.records import Record
        from bench.kernels.tables import results_page
        from bench.kernels.targets import targets

        if self.results["ceilings"]:
            records = [Record.from_json(entry) for entry in self.results["records"]]
            verdicts = targets(Ceilings(**self.results["ceilings"]))
            self.results["targets"] = [target.verdict(records) for target in verdicts]
        text = json.dumps(self.results, indent=1, allow_nan=False)
        (self.folder / "results.json").write_text(text + "\n")
        (self.folder / "results.md").write_text(results_page(self.results))


# --- The sections ---------------------------------------------------------------------------------


def run_worker(run: Run, name: str, limit: float) -> str:
    """`name` in a process of its own, and its lines into the results."""
    lines = run.parts / f"{name}.jsonl"
    command = [sys.executable, "-m", "bench.kernels.gpu_kernels", str(run.parts), "--worker", name]
    command += ["--seconds", str(limit - MARGIN_SECONDS), *(["--tiny"] if run.tiny else [])]
    outcome = finish(start(command), by=time.monotonic() + limit)
    for line in lines.read_text().splitlines() if lines.exists() else ():
        entry = json.loads(line)
        if name == "ceilings":
            about = entry["about"]
            run.results["about"] = {**about, "commit": run.commit or about["commit"]}
            run.results["ceilings"] = entry["ceilings"]
        else:
            run.results["records"].append(entry)
    return outcome


def compiler(run: Run, name: str, number: int, limit: float) -> subprocess.Popen[bytes]:
    """A process that compiles every so many-th case of a benchmark."""
    command = [sys.executable, "-m", "bench.kernels.gpu_kernels", str(run.parts), "--worker", name]
    command += ["--compile", str(number), "--seconds", str(limit - MARGIN_SECONDS)]
    return start(command, run.parts / f"compile.{name}.{number}.log")


def assume_ceilings(run: Run) -> None:
    """Use the ceilings that an H200 is known to reach: tests and benchmarks run without
    measured ones."""
    from bench.kernels.ceilings import REACHABLE

    run.results["ceilings"] = REACHABLE["H200"].to_json()
    entry = {"about": run.results["about"], "ceilings": run.results["ceilings"]}
    (run.parts / "ceilings.jsonl").write_text(json.dumps(entry) + "\n")


def build_extension(run: Run, limit: float) -> str:
    """Build the extension in place; a failure is only noted, as placement also has a torch path."""
    if run.tiny:
        return "skipped: nothing is built at tiny shapes"
    return processes.build_extension(run.parts / "build.log", limit)


def test_kernels(run: Run, limit: float) -> str:
    """The tests, and beside them compilers: what the benchmarks measure later, with the GPU to
    themselves, lies in the caches of Triton and torch.compile by then."""
    by = time.monotonic() + limit
    compilers = [
        compiler(run, name, number, limit)
        for name, hands in COMPILERS.items()
        if name in run.benchmarks
        for number in range(1 if run.tiny else hands)
    ]
    reports = run_tests(run.parts, limit, tiny=run.tiny)
    for compiling in compilers:
        finish(compiling, by=by)
    run.results["tests"] = reports
    for report in reports:
        print(f"  {report['file']}: {report['passed']} passed, {report['failed']} failed, "
              f"{report['skipped']} skipped. {report['note']}")  # fmt: skip
    return FAILED if any(report["bad"] for report in reports) else OK


# --- The workers ----------------------------------------------------------------------------------


def work(name: str, folder: Path, seconds: float, compiles: int | None = None) -> None:
    """One section, in its own process: lines of JSON into `folder / name.jsonl`.

    compiles: of its COMPILERS, this one: it compiles its share of the cases.
    """
    from bench.kernels.ceilings import Ceilings, measure_ceilings
    from bench.kernels.harness import DEVICE, compile_cases, run_cases
    from bench.kernels.records import Record

    if compiles is not None:
        compile_cases(cases_of(name)[compiles :: COMPILERS[name]], seconds=seconds)
        return
    with (folder / f"{name}.jsonl").open("w", buffering=1) as out:
        if name == "ceilings":
            ceilings = measure_ceilings(DEVICE)
            entry = {"about": about(ceilings.name), "ceilings": ceilings.to_json()}
            out.write(json.dumps(entry) + "\n")
            return

        def keep(records: list[Record]) -> None:
            out.writelines(json.dumps(record.to_json()) + "\n" for record in records)

        known = json.loads((folder / "ceilings.jsonl").read_text())["ceilings"]
        seconds -= time.monotonic() - _BEGAN
        run_cases(cases_of(name), ceilings=Ceilings(**known), seconds=seconds, keep=keep)


def cases_of(name: str, **options: bool) -> list[Any]:
    """The cases of a section."""
    if name == "K1":
        from bench.kernels.bench_quantize import cases
    elif name == "K2":
        from bench.kernels.bench_projection import cases
    elif name == "K4":
        from bench.placement.bench_placement import cases
    else:
        from bench.kernels import bench_both_losses, bench_cross_entropy
        from bench.kernels.bench_distill import hidden_cases, logits_cases

        if name == "K3a":
            return logits_cases(**options)
        alone = [*hidden_cases(**options), *bench_cross_entropy.cases(**options)]
        return [*alone, *bench_both_losses.cases(**options)]
    return cases(**options)


def about(device: str) -> dict[str, str]:
    """The provenance of the numbers."""
    from datetime import UTC, datetime
    from importlib.metadata import PackageNotFoundError, version

    from latentwire_fast.evaluation.provenance import commit

    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    packages = ("torch", "triton", "transformers", "numpy", "liger-kernel", "bitsandbytes")
    return {
        "device": device,
        "driver": processes.driver() or "unknown",
        "python": sys.version.split()[0],
        **{package: installed(package) for package in packages},
        "commit": commit() or "unknown",
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def predict() -> None:
    from bench.kernels.tables import prediction_table

    cases = [case for name in sorted(BENCHMARKS) for case in cases_of(name, gpu=True)]
    print(prediction_table(cases))


def run_all(
    folder: Path,
    *,
    tiny: bool,
    commit: str | None,
    seconds: float,
    benchmarks: Sequence[str] = tuple(BENCHMARKS),
) -> int:
    """Every section in turn; the exit status."""
    folder = folder.resolve()  # the sections run in the root of the checkout
    folder.mkdir(parents=True, exist_ok=True)
    parts = folder / "logs"
    parts.mkdir(exist_ok=True)
    empty: dict[str, Any] = {"about": {"device": "unknown"}, "ceilings": None, "targets": []}
    run = Run(
        *(folder, parts, tiny, benchmarks, commit, seconds),
        results={**empty, "sections": [], "tests": [], "records": []},
    )
    run.section("ceilings", lambda limit: run_worker(run, "ceilings", limit))
    measured = run.results["ceilings"] is not None
    if not measured:
        assume_ceilings(run)
    run.section("extension", lambda limit: build_extension(run, limit))
    run.section("tests", lambda limit: test_kernels(run, limit))
    for name in benchmarks:
        run.section(name, lambda limit, name=name: run_worker(run, name, limit))
    wrong = [
        r
        for r in run.results["records"]
        if r["row"] == "ours" and (r["absent"] or "").startswith(("wrong", "failed"))
    ]
    failed = [s for s in run.results["sections"] if s["outcome"].startswith((FAILED, "stopped"))]
    print((folder / "results.md").read_text())
    print(f"written: {folder / 'results.json'}, {folder / 'results.md'}")
    return 1 if wrong or failed or not measured else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="for results.json and results.md")
    parser.add_argument("--tiny", action="store_true", help="on a CPU, at shapes that mean nothing")
    parser.add_argument("--predict", action="store_true", help="print floors and predicted times")
    parser.add_argument("--commit", help="of this tree, where git cannot tell")
    parser.add_argument("--wheels", type=Path, default=ROOT / "wheels", help="a folder of wheels")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="of the whole run")
    parser.add_argument(
        "--only", nargs="+", choices=BENCHMARKS, default=[*BENCHMARKS], help="benchmarks"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--compile", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.predict:
        predict()
        return 0
    if options.folder is None:
        parser.error("name the folder for the results")
    if options.worker:
        work(options.worker, options.folder, options.seconds, options.compile)
        return 0
    packages = options.folder.resolve() / "packages"
    if not ready("gpu_kernels", tiny=options.tiny, wheels=options.wheels, target=packages):
        return 2
    return run_all(
        options.folder,
        tiny=options.tiny,
        commit=options.commit,
        seconds=options.seconds,
        benchmarks=options.only,
    )


if __name__ == "__main__":
    sys.exit(main())
