"""The summary of an evaluation, in a few lines for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from latentwire_fast.evaluation.continuation import WAYS
from latentwire_fast.evaluation.fitting import DOES_NOT_FIT, fits_not
from latentwire_fast.evaluation.methods.base import by_kind, evaluation_methods, methods_by_bits
from latentwire_fast.evaluation.set_scores import METRIC_NAMES

_NLL_METHODS = {
    "text": "text",
    "latent": "latent",
    "closed_book": "closed book",
    "shuffled_latent": "shuffled",
}


def summary_lines(metrics: Mapping[str, Any]) -> list[str]:
    """A table of F1 per method and reader, the bytes, and the verdicts."""
    readers, sizes = metrics["readers"], metrics["bytes"]
    width = str(metrics["latent"]["bits"])
    lines = [
        f"F1 on {metrics['examples']} held-out examples ({metrics['run']['mode']} mode)",
        f"{'':18}" + "".join(f"{name:>12}" for name in readers),
    ]
    not_measured = metrics.get("not_measured") or {}
    lines += _method_lines(readers, not_measured)
    lines += _nll_lines(metrics)
    lines += _set_lines(metrics)
    for bits, size in sizes["payload_mean"].items():
        lines += _width_lines(readers, bits, size)
    lines.append(
        f"text {sizes['text_utf8_mean']:.0f} B, brotli {sizes['text_brotli_mean']:.0f} B, "
        f"payload {sizes['payload_mean'][width]:.0f} B at {width} bits"
    )
    lines += _coded_lines(metrics)
    for name, entry in (metrics.get("lora") or {}).items():
        lines.append(not_frozen(name, entry))
    methods = evaluation_methods()
    for key, reason in not_measured.items():
        lines.append(f"{methods[key].label.lower()}: not measured, {reason}")
    verdicts = (f"{name} {entry['verdict']}" for name, entry in metrics["hypotheses"].items())
    lines.append(", ".join(verdicts))
    return lines


def not_frozen(reader: str, entry: Mapping[str, int]) -> str:
    """Says of a reader with low-rank updates that it is not frozen, and what was trained of it."""
    share = 100 * entry["parameters"] / entry["of"]
    return (
        f"{reader} is not a frozen reader: a LoRA of {entry['parameters']:,} parameters "
        f"({share:.2g}% of its {entry['of']:,}) was trained with the latents"
    )


def _method_lines(readers: Mapping[str, Any], not_measured: Mapping[str, str]) -> Iterator[str]:
    """One line per method, with a dash where it was not measured, or that it does not fit."""
    for key, method in by_kind().items():
        if method.console_label is None:
            continue
        found = [entries.get(key) for entries in readers.values()]
        if (method.with_lora or method.is_optional) and not any(found):
            continue
        missing = DOES_NOT_FIT if fits_not(not_measured.get(key)) else "-"
        cells = [missing if entry is None else _points(entry["f1"]["mean"]) for entry in found]
        label = method.console_label or method.label.lower()
        yield f"{label:18}" + "".join(f"{cell:>12}" for cell in cells)


def _nll_lines(metrics: Mapping[str, Any]) -> Iterator[str]:
    """NLL per token of the gold answers, where it says most, and of second halves of texts."""
    rows = {key: f"NLL {label}" for key, label in _NLL_METHODS.items()}
    yield from _table(rows, metrics["readers"], lambda entry: entry.get("nll_per_token"))
    found = (metrics.get("continuation") or {}).get("readers") or {}
    given = {name: entry["nll_per_token"] for name, entry in found.items()}
    labels = {way: f"rest | {way}".replace("_", " ") for way in WAYS}
    if given:
        yield from _table(labels, given, lambda entry: entry)


def _set_lines(metrics: Mapping[str, Any]) -> Iterator[str]:
    """The sets of a mixture, each in its own score, for the text and for the latent."""
    for name, entry in (metrics.get("sets") or {}).items():
        metric = METRIC_NAMES.get(entry["metric"], entry["metric"])
        yield f"{name}: {metric} on {entry['examples']} examples"
        for key in ("text", "latent"):
            found = [methods.get(key) for methods in entry["readers"].values()]
            cells = ["-" if e is None else _points(e[entry["metric"]]["mean"]) for e in found]
            yield f"  {key:16}" + "".join(f"{cell:>12}" for cell in cells)


def _table(
    labels: Mapping[str, str], readers: Mapping[str, Any], score: Callable[[Any], Any]
) -> Iterator[str]:
    for key, label in labels.items():
        found = [score(entries.get(key) or {}) for entries in readers.values()]
        cells = ["-" if entry is None else f"{entry['mean']:.3f}" for entry in found]
        yield f"{label:18}" + "".join(f"{cell:>12}" for cell in cells)


def _width_lines(readers: Mapping[str, Any], bits: str, size: float) -> Iterator[str]:
    """Scores at one bit width: a line per method, and in brackets what stands beside it."""
    rows, beside = [], []
    for key, method in methods_by_bits().items():
        found = [(entries.get(key) or {}).get(bits) for entries in readers.values()]
        cells = ["-" if entry is None else _points(entry["f1"]) for entry in found]
        if method.by_bits and method.by_bits.beside:
            beside.append(f"{method.by_bits.beside}: {', '.join(cells)}")
        else:
            label = f"{method.label.lower()} {bits} bits"
            rows.append(f"{label:18}" + "".join(f"{cell:>12}" for cell in cells))
    remark = f"  {size:.0f} B" + (f" ({'; '.join(beside)})" if beside else "")
    yield from (row + remark * (i == 0) for i, row in enumerate(rows))


def _coded_lines(metrics: Mapping[str, Any]) -> Iterator[str]:
    """The same text in its shortest forms, and what reading the one that a reader coded costs."""
    sizes, coded = metrics["bytes"], metrics.get("coded_text")
    if coded is None:
        return
    forms = {name: sizes.get(f"text_{name}_mean") for name in ("zlib", "zstd")}
    forms["zstd with a dictionary"] = sizes.get("text_zstd_dictionary_mean")
    words = [f"{name} {size:.0f} B" for name, size in forms.items() if size is not None]
    for name, size in (sizes.get("text_coded_mean") or {}).items():
        if size is not None:
            words.append(f"coded by {name} {size:.1f} B")
    yield f"the same text: {', '.join(words)}"
    for name, entry in coded["readers"].items():
        times = (entry or {}).get("first_token_ms_p50") or {}
        if times.get("payload") is not None and times.get("coded_text") is not None:
            yield (
                f"to the first token, {name}: {times['payload']:.1f} ms from the payload, "
                f"{times['coded_text']:.1f} ms from the text that it coded"
            )


def _points(share: float) -> str:
    return f"{100 * share:.1f}"
