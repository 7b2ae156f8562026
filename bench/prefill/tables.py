"""The tables of the prefill benchmark: Markdown, LaTeX, and what fits a terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from bench.prefill.clock import interval
from bench.prefill.results import Result, Results
from bench.prefill.rows import ENGINES, METHODS, Row


@dataclass(frozen=True)
class Column:
    """A column of the tables: its head, and its cell for a result.

    Attributes:
        papers: which of the two LaTeX tables have it: 1 the times, 2 what is behind them.
    """

    head: str
    cell: Callable[[Results, Result], str]
    papers: tuple[int, ...] = ()


def _figures(value: float | None) -> str:
    """Three significant ones."""
    if value is None:
        return "-"
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if rounded >= 1000 else f"{value:.3g}"


def _scaled(value: float | None, unit: str = "") -> str:
    """A number with its unit's prefix, as in 1.2 kB."""
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
    Column("method", lambda _, r: r.row.label, (1, 2)),
    Column("engine", lambda _, r: r.row.engine, (1, 2)),
    Column("text tokens", lambda _, r: f"{r.row.text_tokens:,}", (1, 2)),
    Column("M", lambda _, r: str(r.row.latents or "-"), (1, 2)),
    Column("bits", lambda _, r: str(r.row.bits or "-"), (1,)),
    Column("positions", lambda _, r: str(r.positions), (1,)),
    Column("payload", lambda _, r: _scaled(r.payload_bytes, "B"), (1,)),
    Column("text", lambda _, r: _scaled(r.text_bytes, "B"), (2,)),
    Column("KV", lambda _, r: _scaled(r.kv_bytes, "B"), (2,)),
    Column("FLOPs", lambda _, r: _scaled(r.flops), (2,)),
    Column(FIRST_TOKEN, _time, (1,)),
    Column("runs", lambda _, r: str(len(r.samples) or "-"), (2,)),
    Column("p95, ms", lambda _, r: _figures(r.p95), (2,)),
    Column("text tokens/s", _rate, (2,)),
    Column("x text, same engine", lambda s, r: _figures(s.speedup(r, engine=r.row.engine)), (1,)),
    Column("x text, eager", lambda s, r: _figures(s.speedup(r, engine="eager")), (1,)),
    Column("floor, ms", lambda _, r: _figures(r.floor), (1,)),
    Column(
        "share of floor",
        lambda _, r: _figures(r.floor / r.p50 if r.floor and r.p50 else None),
        (1,),
    ),
    Column("predicted, ms", lambda _, r: _figures(r.predicted)),
    Column("predicted / measured", _ratio, (2,)),
    Column("peak memory", lambda _, r: _scaled(r.peak_bytes, "B"), (2,)),
    Column("phases, ms", _phases, (2,)),
    Column("phases / total", lambda _, r: f"{r.sum_of_phases:.2f}" if r.samples else "-"),
)


def _with_content(results: Results, columns: Sequence[Column]) -> list[Column]:
    """The columns that some row has a value in: on a CPU, for one, nothing is predicted."""
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
    """Two booktabs tables per reader and batch, for a paper: the times, and what is behind them.

    What does not depend on the text is one line for all text lengths.
    """
    parts = []
    for reader, batch in dict.fromkeys((r.row.reader, r.row.batch) for r in results.ordered()):
        lines: dict[Row, list[Result]] = {}
        for result in results.ordered():
            row = result.row
            if (row.reader, row.batch) == (reader, batch):
                depends = row.method not in ("latent_cached", "deep_prefix")
                lines.setdefault(row if depends else replace(row, text_tokens=0), []).append(result)
        ordered = sorted(lines.values(), key=lambda members: _place(members[0].row))
        for number, what in ((1, "time to the first token"), (2, "sizes, work and phases")):
            caption = f"{reader}, batch {batch}: {what}."
            parts.append(_tabular(results, ordered, number, caption))
    return "\n".join(parts)


def _place(row: Row) -> tuple[int, int]:
    """The place of a line in a LaTeX table; lines of one method stay in order of length and M."""
    return ENGINES.index(row.engine), METHODS.index(row.method)


def _tabular(results: Results, lines: Sequence[Sequence[Result]], number: int, caption: str) -> str:
    """A table of one line for each group of results; where they differ, all of their cells."""
    columns = _with_content(results, [column for column in COLUMNS if number in column.papers])

    def cell(column: Column, members: Sequence[Result]) -> str:
        return _escape(" / ".join(dict.fromkeys(column.cell(results, r) for r in members)))

    kinds = ["l", "l", *"r" * (len(columns) - 2)]
    if columns[-1].head.startswith("phases"):
        kinds[-1] = r"p{0.3\linewidth}"
    head = [
        r"\begin{table*}",
        r"\centering",
        r"\scriptsize\setlength{\tabcolsep}{3pt}",
        rf"\caption{{{_escape(caption)}}}",
    ]
    head += [rf"\begin{{tabular}}{{{''.join(kinds)}}}", r"\toprule"]
    head += [" & ".join(_escape(column.head) for column in columns) + r" \\"]
    body, engine = [], None
    for members in lines:
        if members[0].row.engine != engine:
            engine = members[0].row.engine
            body.append(r"\midrule")
        body.append(" & ".join(cell(column, members) for column in columns) + r" \\")
    return "\n".join([*head, *body, r"\bottomrule", r"\end{tabular}", r"\end{table*}", ""])


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
