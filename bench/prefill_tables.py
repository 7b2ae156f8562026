"""The tables of the prefill benchmark: Markdown, LaTeX, and what fits a terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from prefill_clock import interval
from prefill_results import Result, Results


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


def markdown(results: Results) -> str:
    """One table per reader and batch."""
    lines = []
    for reader, batch in dict.fromkeys((r.row.reader, r.row.batch) for r in results.ordered()):
        lines += [f"### {reader}, batch {batch}", ""]
        chosen = [r for r in results.ordered() if (r.row.reader, r.row.batch) == (reader, batch)]
        head = [column.head for column in COLUMNS]
        cells = [[column.cell(results, result) for column in COLUMNS] for result in chosen]
        lines += [_line(head), _line(["---"] * len(head)), *map(_line, cells), ""]
    return "\n".join(lines)


def latex(results: Results) -> str:
    """The same rows as one booktabs table, for a paper."""
    shown = [column for column in COLUMNS if column.in_paper]
    heads = " & ".join(_escape(column.head) for column in shown)
    lines = [
        r"\begin{tabular}{ll" + "r" * (len(shown) - 2) + "}",
        r"\toprule",
        heads + r" \\",
    ]
    group: tuple[str, int] | None = None
    for result in results.ordered():
        key = (result.row.reader, result.row.batch)
        if key != group:
            title = _escape(f"{key[0]}, batch {key[1]}")
            lines += [
                r"\midrule",
                rf"\multicolumn{{{len(shown)}}}{{l}}{{\emph{{{title}}}}} \\",
            ]
            group = key
        cells = [_escape(column.cell(results, result)) for column in shown]
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


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
