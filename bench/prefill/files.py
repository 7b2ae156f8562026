"""The files of a run of the prefill benchmark."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from bench.prefill.clock import PHASES
from bench.prefill.results import Result, Results
from bench.prefill.rows import ENGINES
from bench.prefill.tables import latex, markdown


def write(results: Results, folder: Path) -> None:
    """All files, each replaced as a whole."""
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / "results.json", json.dumps(results.to_json(), indent=1) + "\n")
    _replace(folder / "table.md", markdown(results))
    _replace(folder / "table.tex", latex(results))
    _write_samples(results, folder / "samples.csv")
    _draw(results, folder)


def _write_samples(results: Results, path: Path) -> None:
    names = ("reader", "method", "encoder", "engine", "batch", "text_tokens", "M", "bits")
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*names, "run", "total_ms", *(f"{p} ms" for p in PHASES)])
        written = set()
        for result in results.ordered():
            r = result.row
            # What does not depend on the text was measured once, for all lengths.
            tokens = None if r.method in ("latent_cached", "deep_prefix") else r.text_tokens
            key = (r.reader, r.method, r.encoder, r.engine, r.batch, tokens, r.latents)
            if (*key, r.bits) in written:
                continue
            written.add((*key, r.bits))
            for number, sample in enumerate(result.samples):
                phases = [sample.phases.get(phase) for phase in PHASES]
                writer.writerow([*key, r.bits, number, sample.total, *phases])
    temporary.replace(path)


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _draw(results: Results, folder: Path) -> None:
    """Time to the first token against prompt length, a line per M: a row of panels per reader, a
    panel per batch."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    measured = [r for r in results.ordered() if r.samples and r.row.text_tokens]
    readers = list(dict.fromkeys(r.row.reader for r in measured))
    batches = sorted({r.row.batch for r in measured})
    if not measured:
        return
    figure, axes = plt.subplots(
        *(len(readers), len(batches)),
        figsize=(4.2 * len(batches), 3.4 * len(readers)),
        squeeze=False,
        sharey="row",
        layout="constrained",
    )
    for reader, row in zip(readers, axes, strict=True):
        for batch, axis in zip(batches, row, strict=True):
            here = [r for r in measured if (r.row.reader, r.row.batch) == (reader, batch)]
            axis.set_title(f"{reader}, batch {batch}")
            if here:
                _draw_panel(axis, here)
    for suffix in ("png", "pdf"):
        figure.savefig(folder / f"latency.{suffix}", dpi=150)
    plt.close(figure)


def _draw_panel(axis: Any, here: list[Result]) -> None:
    """Draw one panel, for the last engine and the first bit width."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    engine = next(e for e in reversed(ENGINES) if any(r.row.engine == e for r in here))
    bits = next((r.row.bits for r in here if r.row.bits), None)
    lines: dict[str, list[Result]] = {}
    for result in here:
        row = result.row
        shown = row.engine == engine and row.method in ("text", "latent_cached")
        if shown and row.bits in (None, bits):
            name = "text" if row.method == "text" else f"latent, M = {row.latents}"
            lines.setdefault(name, []).append(result)
    for name, line in lines.items():
        style = {"color": "black", "linestyle": "--"} if name == "text" else {}
        lengths = [r.row.text_tokens for r in line]
        axis.plot(lengths, [r.p50 for r in line], marker="o", label=name, **style)
    axis.set(xscale="log", yscale="log", xlabel="tokens of the text")
    axis.set_ylabel(f"ms to the first token ({engine})")
    lengths = sorted({r.row.text_tokens for r in here})
    axis.set_xticks(lengths, list(map(str, lengths)))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.xaxis.minorticks_off()
    # Panels may span less than a decade, which leaves no major tick.
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(ScalarFormatter())
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.tick_params(labelleft=True)
    if lines:
        axis.legend(fontsize="small")
