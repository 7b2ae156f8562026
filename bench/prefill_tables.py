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


def _figures(value: float | None) -> str:
    """Three significant ones."""
    if value is None:
        return "-"
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if rounded >= 1000 else f"{value:.3g}"


def _scaled(value: float | None, unit: str = "") -> str:
    """With the unit's prefix, as in 1.2 kB."""
    if value is None:
        return "-"
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.0f} {unit}"


def _time(_results: Results, result: Result) -> str:
    if not result.samples:
        return "-"
    low, high = interval(result.totals)
    return f"{_figures(result.p50)} [{_figures(low)}, {_figures(high)}]"


def _ratio(_results: Results, result: Result) -> str:
    if not result.samples or result.predicted is None:
        return "-"
    return f"{result.predicted / (result.p50 or math.nan):.2f}"


def _rate(_results: Results, result: Result) -> str:
    if not result.p50:
        return "-"
    return f"{1e3 * result.row.batch * result.row.text_tokens / result.p50:,.0f}"


def _phases(_results: Results, result: Result) -> str:
    return ", ".join(f"{name} {_figures(value)}" for name, value in result.phases.items()) or "-"


FIRST_TOKEN = "first token, ms (p50, 95% interval)"
COLUMNS = (
    Column("method", lambda _, r: r.row.label),
    Column("engine", lambda _, r: r.row.engine),
    Column("text tokens", lambda _, r: str(r.row.text_tokens)),
    Column("M", lambda _, r: str(r.row.latents or "-")),
    Column("bits", lambda _, r: str(r.row.bits or "-"), in_paper=False),
    Column("positions", lambda _, r: str(r.positions)),
    Column("payload", lambda _, r: _scaled(r.payload_bytes, "B")),
    Column("text", lambda _, r: _scaled(r.text_bytes, "B")),
    Column("KV", lambda _, r: _scaled(r.kv_bytes, "B"), in_paper=False),
    Column("FLOPs", lambda _, r: _scaled(r.flops), in_paper=False),
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
    Column("peak memory", lambda _, r: _scaled(r.peak_bytes, "B"), in_paper=False),
    Column("phases, ms", _phases, in_paper=False),
    Column(
        "phases / total",
        lambda _, r: f"{r.sum_of_phases:.2f}" if r.samples else "-",
        in_paper=False,
    ),
)


def _with_content(results: Results, columns: Sequence[Column]) -> list[Column]:
    """Those in which some row has something: on a CPU, for one, nothing is predicted."""
    rows = results.results
    return [c for c in columns if any(c.cell(results, result) != "-" for result in rows)]


def markdown(results: Results) -> str:
    """One table per reader and batch."""
    lines = []
    columns = _with_content(results, COLUMNS)
    for reader, batch in dict.fromkeys((r.row.reader, r.row.batch) for r in results.ordered()):
        lines += [f"### {reader}, batch {batch}", ""]
        chosen = [r for r in results.ordered() if (r.row.reader, r.row.batch) == (reader, batch)]
        head = [column.head for column in columns]
        cells = [[column.cell(results, result) for column in columns] for result in chosen]
        lines += [_line(head), _line(["---"] * len(head)), *map(_line, cells), ""]
    return "\n".join(lines)


def latex(results: Results) -> str:
    """The same rows as one booktabs table, for a paper."""
    shown = _with_content(results, [column for column in COLUMNS if column.in_paper])
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
    columns = _with_content(results, [column for column in COLUMNS if column.head in heads])
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
