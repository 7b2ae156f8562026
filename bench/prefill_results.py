"""What was measured, as results.json, samples.csv, Markdown, LaTeX and a figure.

A result is one row for one text length; rows whose time does not depend on the text appear once for
each length that they stand for, with the same samples.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ceilings import Ceilings
from prefill_clock import PHASES, Sample, interval, percentile
from prefill_rows import ENGINES, METHODS, Row, Sizes

SCHEMA_VERSION = 1
BASELINE = "text"


@dataclass(frozen=True)
class Result:
    """One row of the table.

    Attributes:
        samples: of the row's prefills; none where it was only predicted.
        payload_bytes: of one payload; text_bytes: of one context.
        peak_bytes: of the device's memory, weights included; None on a CPU.
        floor, predicted: milliseconds; predicted None where no GPU's figures apply.
    """

    row: Row
    samples: list[Sample]
    payload_bytes: int | None
    text_bytes: float | None
    positions: int
    kv_bytes: int
    flops: int
    floor: float | None = None
    predicted: float | None = None
    peak_bytes: int | None = None

    @property
    def totals(self) -> list[float]:
        return [sample.total for sample in self.samples]

    @property
    def p50(self) -> float | None:
        return percentile(self.totals, 50) if self.samples else None

    @property
    def milliseconds(self) -> float | None:
        """Measured, or else predicted."""
        return self.p50 if self.samples else self.predicted

    @property
    def p95(self) -> float | None:
        return percentile(self.totals, 95) if self.samples else None

    @property
    def phases(self) -> dict[str, float]:
        """The median of each phase."""
        names = self.samples[0].phases if self.samples else ()
        return {name: percentile([s.phases[name] for s in self.samples], 50) for name in names}

    @property
    def sum_of_phases(self) -> float:
        """What share of the total the phases' medians add up to."""
        return sum(self.phases.values()) / (self.p50 or math.nan)


def result_of(
    row: Row,
    sizes: Sizes,
    *,
    ceilings: Ceilings | None,
    rates: Ceilings | None,
    **measured: Any,
) -> Result:
    """A row with its costs, and what was measured if anything was."""
    work = sizes.work(row)
    reader = sizes.reader_pass(row)
    return Result(
        row,
        samples=measured.pop("samples", []),
        payload_bytes=measured.pop("payload_bytes", None),
        text_bytes=measured.pop("text_bytes", None),
        positions=reader.new,
        kv_bytes=reader.kv_bytes,
        flops=work.flops,
        floor=None if ceilings is None else 1e3 * work.floor(ceilings),
        predicted=None if rates is None else 1e3 * work.predict(rates, engine=row.engine),
        **measured,
    )


def for_text(result: Result, tokens: int, text_bytes: float | None) -> Result:
    """A result that does not depend on the text, in the place of one text length."""
    return replace(result, row=replace(result.row, text_tokens=tokens), text_bytes=text_bytes)


@dataclass
class Results:
    """Everything so far, and where it is written."""

    machine: dict[str, Any]
    results: list[Result] = field(default_factory=list)

    def speedup(self, result: Result, *, engine: str) -> float | None:
        """How many times faster than the text in that engine, at the same batch and length."""
        wanted = replace(result.row, method="text", engine=engine, latents=None, bits=None)
        wanted = replace(wanted, encoder=None)
        base = next((other for other in self.results if other.row == wanted), None)
        if base is None or bool(base.samples) != bool(result.samples):
            return None
        times = base.milliseconds, result.milliseconds
        return times[0] / times[1] if times[0] and times[1] else None

    def ordered(self) -> list[Result]:
        """As the tables show them."""
        readers = list(dict.fromkeys(r.row.reader for r in self.results))

        def key(result: Result) -> tuple[Any, ...]:
            row = result.row
            return (
                *(readers.index(row.reader), row.batch, row.text_tokens),
                *(ENGINES.index(row.engine), METHODS.index(row.method)),
                *(row.latents or 0, -(row.bits or 0), row.encoder or ""),
            )

        return sorted(self.results, key=key)

    def to_json(self) -> dict[str, Any]:
        """The content of results.json."""
        rows = [self._entry(result) for result in self.ordered() if result.samples]
        return {"schema_version": SCHEMA_VERSION, "machine": self.machine, "rows": rows}

    def _entry(self, result: Result) -> dict[str, Any]:
        row = result.row
        return {
            "reader": row.reader,
            "method": row.method,
            "engine": row.engine,
            "batch": row.batch,
            "text_tokens": row.text_tokens,
            "M": row.latents,
            "bits": row.bits,
            "positions": result.positions,
            "payload_bytes": result.payload_bytes,
            "text_bytes": result.text_bytes,
            "kv_bytes": result.kv_bytes,
            "flops": result.flops,
            "phases_ms": result.phases,
            "total_ms_p50": result.p50,
            "total_ms_p95": result.p95,
            "speedup_same_engine": self.speedup(result, engine=row.engine),
            "speedup_vs_text_eager": self.speedup(result, engine="eager"),
            "floor_ms": result.floor,
            "share_of_floor": result.floor / result.p50 if result.floor and result.p50 else None,
            "peak_memory_bytes": result.peak_bytes,
        }

    def write(self, folder: Path) -> None:
        """All files, each replaced as a whole."""
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / "results.json", json.dumps(self.to_json(), indent=1) + "\n")
        _replace(folder / "table.md", self.markdown())
        _replace(folder / "table.tex", self.latex())
        self._write_samples(folder / "samples.csv")
        _draw(self, folder)

    def _write_samples(self, path: Path) -> None:
        names = ("reader", "method", "encoder", "engine", "batch", "text_tokens", "M", "bits")
        temporary = path.with_suffix(".tmp")
        with temporary.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*names, "run", "total_ms", *(f"{p} ms" for p in PHASES)])
            for result in self.ordered():
                r = result.row
                key = (r.reader, r.method, r.encoder, r.engine, r.batch, r.text_tokens, r.latents)
                for number, sample in enumerate(result.samples):
                    phases = [sample.phases.get(phase) for phase in PHASES]
                    writer.writerow([*key, r.bits, number, sample.total, *phases])
        temporary.replace(path)

    # --- tables -----------------------------------------------------------------------------------

    def markdown(self) -> str:
        """One table per reader and batch."""
        lines = []
        for reader, batch in dict.fromkeys((r.row.reader, r.row.batch) for r in self.ordered()):
            lines += [f"### {reader}, batch {batch}", ""]
            chosen = [r for r in self.ordered() if (r.row.reader, r.row.batch) == (reader, batch)]
            head = [column.head for column in COLUMNS]
            cells = [[column.cell(self, result) for column in COLUMNS] for result in chosen]
            lines += [_line(head), _line(["---"] * len(head)), *map(_line, cells), ""]
        return "\n".join(lines)

    def latex(self) -> str:
        """The same rows as one booktabs table, for a paper."""
        shown = [column for column in COLUMNS if column.in_paper]
        heads = " & ".join(_escape(column.head) for column in shown)
        lines = [
            r"\begin{tabular}{ll" + "r" * (len(shown) - 2) + "}",
            r"\toprule",
            heads + r" \\",
        ]
        group: tuple[str, int] | None = None
        for result in self.ordered():
            key = (result.row.reader, result.row.batch)
            if key != group:
                title = _escape(f"{key[0]}, batch {key[1]}")
                lines += [
                    r"\midrule",
                    rf"\multicolumn{{{len(shown)}}}{{l}}{{\emph{{{title}}}}} \\",
                ]
                group = key
            cells = [_escape(column.cell(self, result)) for column in shown]
            lines.append(" & ".join(cells) + r" \\")
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


@dataclass(frozen=True)
class Column:
    """A column of the tables: its head, and its cell for a result."""

    head: str
    cell: Callable[[Results, Result], str]
    in_paper: bool = True


def _figures(value: float | None, unit: str = "") -> str:
    return "-" if value is None else f"{value:.3g}{unit}"


def _bytes(value: float | None) -> str:
    if value is None:
        return "-"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} B"


def _time(_results: Results, result: Result) -> str:
    if not result.samples:
        return "-"
    low, high = interval(result.totals)
    return f"{result.p50:.3g} [{low:.3g}, {high:.3g}]"


def _ratio(_results: Results, result: Result) -> str:
    if not result.samples or result.predicted is None:
        return "-"
    return f"{result.predicted / (result.p50 or math.nan):.2f}"


def _rate(_results: Results, result: Result) -> str:
    if not result.p50:
        return "-"
    return f"{1e3 * result.row.batch * result.row.text_tokens / result.p50:,.0f}"


def _phases(_results: Results, result: Result) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in result.phases.items()) or "-"


FIRST_TOKEN = "first token, ms (p50, 95% interval)"
COLUMNS = (
    Column("method", lambda _, r: r.row.label),
    Column("engine", lambda _, r: r.row.engine),
    Column("text tokens", lambda _, r: str(r.row.text_tokens)),
    Column("M", lambda _, r: str(r.row.latents or "-")),
    Column("bits", lambda _, r: str(r.row.bits or "-"), in_paper=False),
    Column("positions", lambda _, r: str(r.positions)),
    Column("payload", lambda _, r: _bytes(r.payload_bytes)),
    Column("text", lambda _, r: _bytes(r.text_bytes)),
    Column("KV", lambda _, r: _bytes(r.kv_bytes), in_paper=False),
    Column("FLOPs", lambda _, r: f"{r.flops:.3g}", in_paper=False),
    Column(FIRST_TOKEN, _time),
    Column("runs", lambda _, r: str(len(r.samples) or "-"), in_paper=False),
    Column("p95, ms", lambda _, r: _figures(r.p95), in_paper=False),
    Column("text tokens/s", _rate, in_paper=False),
    Column("x text, same engine", lambda s, r: _figures(s.speedup(r, engine=r.row.engine))),
    Column("x text, eager", lambda s, r: _figures(s.speedup(r, engine="eager"))),
    Column("floor, ms", lambda _, r: _figures(r.floor)),
    Column(
        "share of floor",
        lambda _, r: _figures(r.floor / r.p50 if r.floor and r.p50 else None),
    ),
    Column("predicted, ms", lambda _, r: _figures(r.predicted), in_paper=False),
    Column("predicted / measured", _ratio, in_paper=False),
    Column("peak memory", lambda _, r: _bytes(r.peak_bytes), in_paper=False),
    Column("phases, ms", _phases, in_paper=False),
    Column(
        "phases / total",
        lambda _, r: f"{r.sum_of_phases:.2f}" if r.samples else "-",
        in_paper=False,
    ),
)


def short_table(results: Results, shown: Iterable[Result]) -> str:
    """The columns that fit a terminal."""
    heads = ("method", "engine", "text tokens", "M", "bits", "positions", FIRST_TOKEN)
    heads += ("x text, same engine", "x text, eager", "share of floor", "predicted / measured")
    columns = [column for column in COLUMNS if column.head in heads]
    rows = [[column.head for column in columns]]
    rows += [[column.cell(results, result) for column in columns] for result in shown]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escape(text: str) -> str:
    for character in "&%_#":
        text = text.replace(character, "\\" + character)
    return text


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


# --- figure ---------------------------------------------------------------------------------------


def _draw(results: Results, folder: Path) -> None:
    """Time to the first token against prompt length, a line per M, a panel per reader and batch."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    measured = [r for r in results.ordered() if r.samples and r.row.text_tokens]
    panels = list(dict.fromkeys((r.row.reader, r.row.batch) for r in measured))
    if not panels:
        return
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.2 * len(panels), 3.4), squeeze=False, layout="constrained"
    )
    for axis, panel in zip(axes[0], panels, strict=True):
        here = [r for r in measured if (r.row.reader, r.row.batch) == panel]
        engine = next(e for e in reversed(ENGINES) if any(r.row.engine == e for r in here))
        bits = next((r.row.bits for r in here if r.row.bits), None)
        lines: dict[str, list[Result]] = {}
        for result in here:
            row = result.row
            if row.engine != engine or row.method not in ("text", "latent_cached"):
                continue
            if row.bits not in (None, bits):
                continue
            name = "text" if row.method == "text" else f"latent, M = {row.latents}"
            lines.setdefault(name, []).append(result)
        for name, line in lines.items():
            style = {"color": "black", "linestyle": "--"} if name == "text" else {}
            lengths = [r.row.text_tokens for r in line]
            axis.plot(lengths, [r.p50 for r in line], marker="o", label=name, **style)
        axis.set(
            xscale="log",
            yscale="log",
            xlabel="tokens of the text",
            title=f"{panel[0]}, B={panel[1]}",
        )
        axis.set_ylabel(f"ms to the first token ({engine})")
        lengths = sorted({r.row.text_tokens for r in here})
        axis.set_xticks(lengths, list(map(str, lengths)))
        axis.minorticks_off()
        axis.legend(fontsize="small")
    for suffix in ("png", "pdf"):
        figure.savefig(folder / f"latency.{suffix}", dpi=150)
    plt.close(figure)
