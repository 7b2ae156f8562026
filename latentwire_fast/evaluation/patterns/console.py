"""The results of a pattern, in a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from latentwire_fast.registry import PATTERNS

_COSTS = {
    "bytes": "bytes",
    "gflops": "GFLOP",
    "ms": "ms",
    "sender_gflops": "sender GFLOP",
    "sender_ms": "sender ms",
}


def pattern_lines(results: Mapping[str, Any]) -> list[str]:
    """What was measured on how much, and a row for each method: scores in percent with their 95%
    intervals, and what one question costs."""
    rows = results["rows"]
    names = list(dict.fromkeys(name for row in rows for name in row["scores"]))
    table = [["given", "method", *names, *_COSTS.values()]]
    table += [
        [
            row["given"].replace("_", " "),
            row["method"],
            *(_score(row["scores"].get(name)) for name in names),
            *(_number(row[cost]) for cost in _COSTS),
        ]
        for row in rows
    ]
    title = PATTERNS[results["pattern"]].title
    fitted = results["validation"]
    others = f", {fitted} others to fit on" if fitted else ""
    heading = f"{title}: {results['questions']} questions{others} ({results['data']})"
    return [heading, *_aligned(table)]


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]


def _score(found: Mapping[str, float] | None) -> str:
    if found is None:
        return "-"
    return f"{100 * found['mean']:.1f} [{100 * found['low']:.1f}, {100 * found['high']:.1f}]"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == 0 else f"{value:.3g}"
