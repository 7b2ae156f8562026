"""The figure of a sweep as PNG bytes: F1 against bytes, for every variant and bit width.

What a payload is held against stands in the same picture: the text, cut to as many bytes, and as
lines the bytes of the whole text: plain, after brotli, after zstd with a dictionary, and coded by
the reader.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from string import ascii_lowercase
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from latentwire_fast.evaluation.report.figures import (
    COLOURS,
    INK,
    MUTED,
    STYLE,
    annotate,
    byte_axis,
    png,
)

NAMED = 8  # of the best points at their size, at most so many have a letter and a line of the key
KEPT = 0.95  # share of the text's F1 that hypotheses about bytes ask for
TEXT_LINES = {"utf8": "UTF-8", "brotli": "brotli", "zstd_dictionary": "zstd, dictionary"}


@dataclass(frozen=True, order=True)
class _Point:
    """A variant at one of its widths. F1 and its spread over the seeds are in points."""

    size: float
    f1: float
    sd: float
    label: str
    variant: str
    kind: str


def sweep_figure(table: Mapping[str, Any]) -> bytes | None:
    """F1 against bytes, one panel for each reader. Joined by a dark line: the points that no other
    point beats with as few bytes.

    Args:
        table: of `sweep_table`.

    Returns:
        PNG bytes, or None where nothing is finished.
    """
    panels = {name: sorted(_points(table, name)) for name in table["readers"]}
    panels = {name: points for name, points in panels.items() if points}
    if not panels:
        return None
    kinds = list(dict.fromkeys(p.kind for points in panels.values() for p in points))
    colours = dict(zip(sorted(kinds), cycle(COLOURS), strict=False))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 4.0 * len(panels) + 0.5), layout="constrained")
        rows = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
        for axes, (name, points) in zip(rows, panels.items(), strict=True):
            lines = dict(_text_sizes(table, name))
            _draw_text(axes, table, name, lines)
            _draw_points(axes, points, colours)
            axes.set_title(name, pad=16)
            axes.set_ylabel("F1, points")
            axes.set_ylim(-4, 104)
            byte_axis(axes, [*(point.size for point in points), *lines.values()])
        figure.legend(handles=_legend(colours), loc="outside lower center", ncols=3)
        return png(figure)


def _entries(table: Mapping[str, Any], reader: str) -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """(variant, its row of the table, the reader's part of it) of what is finished."""
    for variant, found in table["variants"].items():
        entry = ((found or {}).get("readers") or {}).get(reader)
        if entry:
            yield variant, found, entry


def _points(table: Mapping[str, Any], reader: str) -> Iterator[_Point]:
    """The variants at each of their widths."""
    for variant, found, entry in _entries(table, reader):
        for bits, score in (entry.get("f1_by_bits") or {}).items():
            size = found["bytes_by_bits"].get(bits)
            if size and score is not None:
                f1, sd = 100 * score["mean"], 100 * (score["sd"] or 0.0)
                label = f"{variant}, {bits} bits"
                yield _Point(size, f1, sd, label, variant, found.get("bottleneck") or "payload")


def _text_sizes(table: Mapping[str, Any], reader: str) -> Iterator[tuple[str, float]]:
    """(label, bytes) of the whole text in its forms, of the first variant that has them."""
    for _, found, entry in _entries(table, reader):
        sizes = found.get("text_bytes") or {}
        yield from ((TEXT_LINES[form], sizes[form]) for form in TEXT_LINES if sizes.get(form))
        if entry.get("coded_bytes"):
            yield f"coded by {reader}", entry["coded_bytes"]
        return


def _draw_text(
    axes: Axes, table: Mapping[str, Any], reader: str, lines: Mapping[str, float]
) -> None:
    """What payloads are held against."""
    for label, size in lines.items():
        axes.axvline(size, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        place: Any = {"xycoords": ("data", "axes fraction"), "ha": "center", "fontsize": 7.5}
        annotate(axes, f"{label} {size:.0f}", (size, 1), (0, 11), **place)
    cut = {}
    texts = []
    for _, found, entry in _entries(table, reader):
        for bits, score in (entry.get("cut_text_f1_by_bits") or {}).items():
            if score is not None and found["bytes_by_bits"].get(bits):
                cut[found["bytes_by_bits"][bits]] = 100 * score["mean"]
        if entry.get("text_f1"):
            texts.append(100 * entry["text_f1"]["mean"])
    sizes = sorted(cut)
    axes.plot(sizes, [cut[size] for size in sizes], "v:", color=MUTED, markersize=4, linewidth=1.2)
    if texts:
        axes.axhline(KEPT * texts[0], color=MUTED, linewidth=1, linestyle=":")


def _draw_points(axes: Axes, points: Sequence[_Point], colours: Mapping[str, str]) -> None:
    for variant in dict.fromkeys(point.variant for point in points):
        own = [point for point in points if point.variant == variant]
        colour = colours[own[0].kind]
        sizes, f1 = [p.size for p in own], [p.f1 for p in own]
        axes.plot(sizes, f1, color=colour, alpha=0.35, linewidth=1)
        errors = [p.sd for p in own]
        axes.errorbar(sizes, f1, yerr=errors, fmt="o", color=colour, markersize=4.5, linewidth=1)
    best: list[_Point] = []
    for point in sorted(points, key=lambda p: (p.size, -p.f1)):
        if not best or point.f1 > best[-1].f1:
            best.append(point)
    axes.plot([p.size for p in best], [p.f1 for p in best], color=INK, linewidth=1.3, zorder=1.5)
    key = []
    for letter, point in zip(ascii_lowercase, best[-NAMED:], strict=False):
        above: Any = {"ha": "center", "fontsize": 8, "fontweight": "bold"}
        annotate(axes, letter, (point.size, point.f1), (0, 14), **above)
        key.append(f"{letter}  {point.f1:.1f}, {point.size:.0f} bytes: {point.label}")
    place: Any = {"transform": axes.transAxes, "va": "top", "color": MUTED}
    axes.text(1.02, 1, "\n".join(key), fontsize=7.5, linespacing=1.5, **place)


def _legend(colours: Mapping[str, str]) -> list[Line2D]:
    """What the marks stand for."""
    marks = [
        Line2D([], [], color=colour, marker="o", alpha=0.8, linewidth=1, label=kind)
        for kind, colour in colours.items()
    ]
    return [
        *marks,
        Line2D([], [], color=INK, linewidth=1.3, label="best for its bytes"),
        Line2D([], [], color=MUTED, marker="v", linestyle=":", label="text cut to the bytes"),
        Line2D([], [], color=MUTED, linestyle=":", linewidth=1, label="95% of the text's F1"),
        Line2D([], [], color=MUTED, linestyle=(0, (4, 3)), linewidth=1, label="the whole text"),
    ]
