"""Markdown tables of the measurements.

python -m bench.kernels.tables runs/bench/benchmark.json    # written by pytest-benchmark
python -m bench.kernels.tables OUT/results.json             # written by gpu_kernels.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.kernels.ceilings import DATASHEETS, REACHABLE, Ceilings
from bench.kernels.harness import Case
from bench.kernels.records import Record

TITLES = {
    "K1": "K1: group quantisation",
    "K2": "K2: projection and RMS calibration",
    "K3": "K3: losses",
    "K4": "K4: placement of a K/V prefix",
}


def seconds(value: float | None) -> str:
    """A time in the unit that suits it."""
    if value is None:
        return "-"
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-6:.3g} us"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def record_cells(record: Record) -> list[str]:
    """A row of a case's table."""
    if record.timing is None:
        return [record.row, record.absent or "not timed", *["-"] * 7]
    timing = record.timing
    rates = [f"{record.traffic / timing.p50 / 1e9:.4g} GB/s"] if record.traffic else []
    rates += [f"{record.flops / timing.p50 / 1e12:.3g} TFLOP/s"] if record.flops else []
    return [
        record.row,
        seconds(timing.p50),
        f"{seconds(timing.p20)} to {seconds(timing.p80)}",
        ", ".join(rates) or "-",
        f"{record.share_of_floor:.2f}",
        "-" if record.peak_bytes is None else f"{record.peak_bytes / 2**20:.4g} MiB",
        "-" if record.launches is None else str(record.launches),
        ", ".join(f"{what} {error:.1e}" for what, error in record.errors.items()),
        "-" if record.against_ours is None else f"{record.against_ours:.2f}x",
    ]


HEAD = (
    *("row", "median", "20 % to 80 %", "rate", "share of floor", "peak memory", "launches"),
    *("error", "time over ours"),
)


def record_tables(records: Iterable[Record]) -> str:
    """One table per case, under one heading per kernel."""
    cases: dict[str, dict[tuple[str, tuple[int, ...]], list[Record]]] = {}
    for record in records:
        of_kernel = cases.setdefault(record.kernel, {})
        of_kernel.setdefault((record.name, record.shape), []).append(record)
    parts = []
    for kernel, of_kernel in sorted(cases.items()):
        parts.append(f"## {TITLES[kernel]}")
        for (name, shape), rows in of_kernel.items():
            how = sorted({r.timing.method for r in rows if r.timing})
            parts.append(
                f"**{name}**, {' x '.join(map(str, shape))}; floor {seconds(rows[0].floor)}; "
                f"by {' and '.join(how) or 'nothing'}"
            )
            parts.append(table(HEAD, map(record_cells, rows)))
    return "\n\n".join(parts)


def prediction_table(cases: Iterable[Case]) -> str:
    """Floors by the datasheets, and what our design should take by what is reachable."""
    head = ["case", "shape", "bytes", "FLOPs"]
    head += [f"{name} {what}" for name in DATASHEETS for what in ("floor", "predicted")]
    rows = []
    for case in cases:
        cells = [f"{case.kernel} {case.name}", " x ".join(map(str, case.shape))]
        cells += [
            f"{amount:.3g}" for amount in (case.work.traffic + case.work.link, case.work.flops)
        ]
        for name, datasheet in DATASHEETS.items():
            cells.append(seconds(datasheet.floor(case.work)))
            cells.append(seconds(case.predicted(REACHABLE[name])))
        rows.append(cells)
    return table(head, rows)


def ceilings_line(ceilings: Ceilings) -> str:
    return (
        f"Ceilings ({ceilings.name}): copy {ceilings.bytes_per_second / 1e12:.3g} TB/s "
        "(reads and writes), bf16 "
        f"matmul {ceilings.flops_per_second / 1e12:.4g} TFLOP/s, one launch "
        f"{seconds(ceilings.launch_seconds)}, host to device "
        f"{ceilings.link_bytes_per_second / 1e9:.3g} GB/s."
    )


def target_table(verdicts: Iterable[Mapping[str, Any]]) -> str:
    words = {True: "met", False: "**missed**", None: "not measured"}
    rows = []
    for verdict in verdicts:
        value = "-" if verdict["value"] is None else f"{verdict['value']:.3g}"
        worst = f"worst of {verdict['cases']}" if verdict["cases"] > 1 else ""
        left = f"{verdict['unmeasured_cases']} not measured" if verdict["unmeasured_cases"] else ""
        note = ", ".join(filter(None, (worst, left)))
        rows.append(
            [
                *(verdict["kernel"], verdict["what"], verdict["target"], value, note),
                words[verdict["met"]],
            ]
        )
    return table(("kernel", "figure", "target", "value", "cases", ""), rows)


def results_page(results: Mapping[str, Any]) -> str:
    """results.md of a run of gpu_kernels.py."""
    about = results["about"]
    records = [Record.from_json(entry) for entry in results["records"]]
    parts = [f"# {about['device']}"]
    parts.append(table(("", ""), [[k, str(v)] for k, v in about.items() if k != "device"]))
    if results["ceilings"]:
        parts.append(ceilings_line(Ceilings(**results["ceilings"])))
    parts.append(
        table(
            ("section", "outcome", "seconds"),
            [[s["name"], s["outcome"], f"{s['seconds']:.0f}"] for s in results["sections"]],
        )
    )
    if results["tests"]:
        columns = ("passed", "failed", "skipped")
        rows = [[t["file"], *(str(t[c]) for c in columns), t["note"]] for t in results["tests"]]
        parts.append(table(("tests", *columns, ""), rows))
    if results["targets"]:
        parts += ["## Targets", target_table(results["targets"])]
    parts.append(record_tables(records))
    return "\n\n".join(parts) + "\n"


def benchmark_page(report: Mapping[str, Any]) -> str:
    """The records in pytest-benchmark's file."""
    found = [entry["extra_info"] for entry in report["benchmarks"]]
    records = [Record.from_json(entry) for entry in found if "kernel" in entry]
    return f"# {report['datetime'][:10]}\n\n{record_tables(records)}\n"


def main(path: str) -> None:
    content = json.loads(Path(path).read_text())
    page = benchmark_page if "benchmarks" in content else results_page
    sys.stdout.write(page(content))


if __name__ == "__main__":
    main(sys.argv[1])
