"""The figure of a sweep as PNG bytes: F1 against bytes, for every variant and bit width."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from latentwire_fast.evaluation.report.figures import (
    COLOURS,
    MUTED,
    STYLE,
    annotate,
    byte_axis,
    png,
)

NAMED = 8  # of the best points at their size, at most so many have their names written


class _Point(NamedTuple):
    size: float
    f1: float
    sd: float
    label: str


def sweep_figure(table: Mapping[str, Any]) -> bytes | None:
    """F1 against bytes, one panel for each reader. In colour: the points that no other point beats
    with as few bytes.

    Args:
        table: of `sweep_table`.

    Returns:
        PNG bytes, or None where nothing is finished.
    """
    panels = {name: sorted(_points(table, name)) for name in table["readers"]}
    panels = {name: points for name, points in panels.items() if points}
    if not panels:
        return None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.4, 3.6 * len(panels)), layout="constrained")
        rows = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
        for axes, (name, points) in zip(rows, panels.items(), strict=True):
            _draw(axes, points)
            axes.set_title(f"{name}: F1 of every variant and width")
            axes.set_ylabel("F1, points")
            byte_axis(axes, [point.size for point in points])
        return png(figure)


def _points(table: Mapping[str, Any], reader: str) -> Iterator[_Point]:
    """The variants at each of their widths."""
    for variant, found in table["variants"].items():
        entry = ((found or {}).get("readers") or {}).get(reader) or {}
        for bits, score in (entry.get("f1_by_bits") or {}).items():
            size = found["bytes_by_bits"].get(bits)
            if size and score is not None:
                label = f"{variant}, {bits} bits"
                yield _Point(size, 100 * score["mean"], 100 * (score["sd"] or 0.0), label)


def _draw(axes: Axes, points: list[_Point]) -> None:
    best: list[_Point] = []
    for point in sorted(points, key=lambda p: (p.size, -p.f1)):
        if not best or point.f1 > best[-1].f1:
            best.append(point)
    axes.errorbar(
        [p.size for p in points],
        [p.f1 for p in points],
        yerr=[p.sd for p in points],
        fmt="o",
        color=MUTED,
        alpha=0.45,
        markersize=4,
        linewidth=1,
    )
    axes.plot([p.size for p in best], [p.f1 for p in best], "o-", color=COLOURS[0], markersize=5)
    for point in best[-NAMED:]:
        annotate(axes, point.label, (point.size, point.f1), (4, -4), fontsize=7.5)
