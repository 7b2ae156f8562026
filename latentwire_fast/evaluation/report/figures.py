"""The report's figures as PNG bytes: accuracy against bytes, and how the training went.

Figures are drawn on `Figure` objects rather than through pyplot: no global state, no display, and
the same input gives the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, cycle, groupby
from statistics import median
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from latentwire_fast.evaluation.methods.base import methods_by_bits
from latentwire_fast.evaluation.report.figure_names import FONTS, MANY, shown_names
from latentwire_fast.evaluation.report.formatting import Measured, measured

Records = Sequence[Mapping[str, Any]]
Curve = tuple[list[float], list[float]]

# Okabe and Ito (2008): told apart by readers of every kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
# Pictures are transparent: these are read on white and on the dark page alike.
INK, MUTED = "#6b7a90", "#75839a"
STYLE: dict[Any, Any] = {
    "font.family": FONTS,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.edgecolor": "#94a3b880",
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#94a3b84d",
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}
DPI = 200
# Mantissas of the ticks on a logarithmic axis that spans more, or less, than one decade.
COARSE_TICKS, FINE_TICKS = (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)
# What the markers of whole texts stand for: (marker, filled, label).
TEXT_MARKERS = (("s", False, "text, brotli"), ("s", True, "text, UTF-8"))


def accuracy_figure(metrics: Mapping[str, Any]) -> bytes | None:
    """F1 against bytes: per reader a curve over the bit widths, one of text cut to as many bytes,
    and the whole text.

    Returns:
        PNG bytes, or None when no payload was scored.
    """
    readers = {
        name: _Points(methods, metrics)
        for name, methods in _few_readers(metrics.get("readers") or {}).items()
    }
    widths = {bits: size for points in readers.values() for size, _, bits in points.latent}
    if not widths:
        return None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.4, 4.7), layout="constrained")
        axes = figure.subplots()
        handles = []
        for colour, (name, points) in zip(cycle(COLOURS), readers.items(), strict=False):
            points.draw(axes, colour)
            handles.append(Line2D([], [], color=colour, linewidth=2, label=name))
        above: Any = {"xycoords": ("data", "axes fraction"), "ha": "center"}
        for bits, size in widths.items():
            annotate(axes, f"{bits} bits", (size, 1), (0, 12), **above)
        byte_axis(axes, [size for points in readers.values() for size in points.sizes()])
        axes.set_ylim(-9, 106)
        axes.set_yticks(range(0, 101, 20))
        axes.set_ylabel("F1 (%)")
        figure.legend(handles=handles, loc="outside upper left", ncols=3)
        handles = []
        curves = [m.by_bits for m in methods_by_bits().values() if m.by_bits]
        markers = [(curve.marker, True, curve.legend) for curve in curves]
        for marker, is_filled, label in (*markers, *TEXT_MARKERS):
            face = MUTED if is_filled else "none"
            handles.append(
                Line2D([], [], color=MUTED, marker=marker, mfc=face, linestyle="", label=label)
            )
        figure.legend(handles=handles, loc="outside lower center", ncols=2)
        return png(figure)


def _few_readers(readers: Mapping[str, Any]) -> dict[str, Any]:
    """The readers' scores by the names that are drawn; of many readers, their median F1 with bars
    from the lowest to the highest."""
    if len(readers) <= MANY:
        return {shown: readers[name] for name, shown in shown_names(list(readers)).items()}
    entries = list(readers.values())

    def spread(found: list[Any]) -> dict[str, Any]:
        means = sorted(score.mean for score in map(measured, found) if score)
        if not means:
            return {"f1": None}
        return {"f1": {"mean": median(means), "low": means[0], "high": means[-1]}}

    drawn: dict[str, Any] = {"text": spread([(e.get("text") or {}).get("f1") for e in entries])}
    for key in methods_by_bits():
        of_entries = [entry.get(key) or {} for entry in entries]
        drawn[key] = {
            bits: spread([(of_entry.get(bits) or {}).get("f1") for of_entry in of_entries])
            for bits in dict.fromkeys(chain.from_iterable(of_entries))
        }
    return {f"median of {len(readers)} readers": drawn}


def byte_axis(axes: Axes, sizes: Sequence[float]) -> None:
    """A logarithmic axis of bytes around these sizes."""
    low, high = min(sizes) * 0.8, max(sizes) * 1.25
    mantissas = FINE_TICKS if high < 10 * low else COARSE_TICKS
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(FixedLocator([m * 10**e for e in range(8) for m in mantissas]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("mean bytes per prompt (logarithmic)")


def annotate(
    axes: Axes, text: str, place: tuple[float, float], offset: tuple[float, float], **style: Any
) -> None:
    """Words beside a place of the data, so many points away."""
    axes.annotate(text, place, offset, textcoords="offset points", va="top", color=MUTED, **style)


def _by_size(
    scores: Mapping[str, Any] | None, payload: Mapping[str, float]
) -> list[tuple[float, Measured, str]]:
    """(bytes, F1, bits) of what was measured at several bit widths, smallest first."""
    return sorted(
        (payload[bits], score, bits)
        for bits, of_width in (scores or {}).items()
        if payload.get(bits) and (score := measured(of_width.get("f1")))
    )


class _Points:
    """The points that one reader adds to the first figure."""

    def __init__(self, methods: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
        sizes = metrics.get("bytes") or {}
        payload = sizes.get("payload_mean") or {}
        self.bits = str((metrics.get("latent") or {}).get("bits"))
        self.curves = [
            (_by_size(methods.get(key), payload), method.by_bits)
            for key, method in methods_by_bits().items()
            if method.by_bits
        ]
        self.latent = self.curves[0][0]
        self.text = measured((methods.get("text") or {}).get("f1"))
        self.text_sizes = (sizes.get("text_brotli_mean"), sizes.get("text_utf8_mean"))

    def sizes(self) -> list[float]:
        """Every byte count that is drawn or marked."""
        return [size for size, _, _ in self.latent] + [s for s in self.text_sizes if s]

    def draw(self, axes: Axes, colour: str) -> None:
        for points, curve in self.curves:
            axes.plot(
                [size for size, _, _ in points],
                [100 * score.mean for _, score, _ in points],
                color=colour,
                linestyle=curve.line,
                linewidth=1.8,
            )
            for size, score, bits in points:
                scale = 8.5 if bits == self.bits else 5.5
                _dot(axes, size, score, colour, marker=curve.marker, scale=scale)
        if self.text:
            for text_size, face in zip(self.text_sizes, ("none", colour), strict=True):
                if text_size:
                    _dot(axes, text_size, self.text, colour, marker="s", face=face)


def _dot(
    axes: Axes,
    size: float,
    score: Measured,
    colour: str,
    *,
    marker: str,
    face: str | None = None,
    scale: float = 6.5,
) -> None:
    """A point with the interval of its score."""
    if score.low is not None and score.high is not None:
        axes.vlines(size, 100 * score.low, 100 * score.high, color=colour, alpha=0.4, linewidth=1.4)
    axes.plot(size, 100 * score.mean, marker, color=colour, mfc=face or colour, markersize=scale)


# --- learning curves ------------------------------------------------------------------------------


def learning_figure(diagnostics: Records, validations: Records = ()) -> bytes | None:
    """Loss by objective, accuracy by reader, latent rank and validations over the steps, stages
    marked.

    Returns:
        PNG bytes, or None when nothing was logged.
    """
    ranks = [
        (r["step"], {"effective rank": (r.get("latent") or {}).get("effective_rank")})
        for r in diagnostics
    ]
    panels = [
        ("Loss", "nats per token", _curves((r["step"], _objectives(r)) for r in diagnostics)),
        (
            "Training accuracy",
            "share right",
            _curves((r["step"], r.get("accuracy") or {}) for r in diagnostics),
        ),
        ("Latents of a batch", "rank, below batch size", _curves(ranks)),
        ("Validation NLL", "nats per token", _validation_curves(validations, "nll")),
        ("Validation F1", "share of 1", _validation_curves(validations, "f1")),
    ]
    panels = [panel for panel in panels if panel[2]]
    if not panels:
        return None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.4, 2.2 * len(panels) + 0.5), layout="constrained")
        rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (title, unit, curves) in zip(rows, panels, strict=True):
            _draw_curves(axes, curves)
            axes.set_title(title)
            axes.set_ylabel(unit)
            for start in [first for first, _ in _stages(diagnostics)][1:]:
                axes.axvline(start, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
        for number, (start, name) in enumerate(_stages(diagnostics)):
            lower = 11 * (number % 2)  # a short stage's name would run into the next one
            late = start > 0.9 * diagnostics[-1]["step"]  # and a late one's into the legend
            side, align = (-4, "right") if late else (4, "left")
            place: Any = {"xycoords": ("data", "axes fraction"), "ha": align}
            annotate(rows[0], name, (start, 1), (side, -3 - lower), **place)
        rows[0].set_ylim(top=1.3 * rows[0].get_ylim()[1])  # room for the stages' names
        rows[-1].set_xlabel("step")
        rows[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        return png(figure)


def _validation_curves(validations: Records, score: str) -> dict[str, Curve]:
    """One score of every reader over the steps that were validated."""
    return _curves(
        (entry["step"], {name: scores[score] for name, scores in entry["scores"].items()})
        for entry in validations
    )


def _draw_curves(axes: Axes, curves: Mapping[str, Curve]) -> None:
    """Each curve as logged, faint, under a running mean; named at its right end."""
    shown = shown_names(list(curves))
    for colour, (name, (steps, values)) in zip(cycle(COLOURS), curves.items(), strict=False):
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.9)
        axes.plot(steps, _running_mean(values), color=colour, linewidth=1.9, label=shown[name])
    axes.set_ylim(bottom=0)
    if len(curves) > 1:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.05))


# What is not in nats per token.
UNITS = {
    "select": "select (per text)",
    "kv": "kv (relative error)",
    "embed": "embed (relative error)",
    "attention": "attention (relative error)",
    "attention_continued": "attention_continued (relative error)",
}


def _objectives(record: Mapping[str, Any]) -> dict[str, float]:
    """The losses of one record by objective: the mean over readers of `objective/reader`."""
    found: dict[str, list[float]] = {}
    for name, value in (record.get("losses") or {}).items():
        if value is not None:
            found.setdefault(name.split("/")[0], []).append(value)
    if not found and record.get("loss") is not None:
        found["loss"] = [record["loss"]]
    return {UNITS.get(name, name): sum(v) / len(v) for name, v in found.items()}


def _curves(rows: Iterator[tuple[int, Mapping[str, Any]]] | Sequence[Any]) -> dict[str, Curve]:
    """Per name the steps at which it was logged, and its values."""
    curves: dict[str, Curve] = {}
    for step, values in rows:
        named = [value for value in values.values() if value is not None]
        if len(named) > MANY:
            values = {"highest": max(named), "median": median(named), "lowest": min(named)}
        for name, value in values.items():
            if value is not None:
                steps, logged = curves.setdefault(name, ([], []))
                steps.append(step)
                logged.append(value)
    return curves


def _running_mean(values: Sequence[float]) -> list[float]:
    """Mean over about a thirtieth of the curve, centred: it does not lag behind what it smooths."""
    reach = len(values) // 60
    means = []
    for i in range(len(values)):
        near = min(reach, i, len(values) - 1 - i)
        window = values[i - near : i + near + 1]
        means.append(sum(window) / len(window))
    return means


def _stages(diagnostics: Records) -> list[tuple[int, str]]:
    """(first logged step, name) of each stage in turn."""
    runs = groupby(diagnostics, key=lambda record: record.get("stage"))
    return [(next(records)["step"], str(name)) for name, records in runs if name is not None]


def png(figure: Figure) -> bytes:
    """A figure as the bytes of a file."""
    buffer = io.BytesIO()
    # Without the version that matplotlib would add, two machines can write the same bytes.
    figure.savefig(buffer, format="png", dpi=DPI, transparent=True, metadata={"Software": None})
    return buffer.getvalue()
