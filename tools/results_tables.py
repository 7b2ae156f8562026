"""The tables of docs/results.md, from the metrics.json of finished runs.

    python tools/results_tables.py runs/demo runs/context

Prints Markdown: F1 of every method with its interval, F1 by bit width, bytes of payloads and of the
same text in every form, what unpacking coded text costs, verdicts, times, and the command, seed,
commit and wall time behind each column. Needs nothing but Python.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

METHODS = {
    "text": "full text",
    "latent": "**latent**",
    "token_budget": "text cut to as many positions",
    "token_budget_question": "the same, question kept",
    "byte_budget": "text cut to the payload's bytes",
    "selective_context": "the words least expected, in as many positions",
    "selective_context_bytes": "the same, in the payload's bytes",
    "bm25_sentences": "the sentences that match the question, in as many positions",
    "bm25_sentences_bytes": "the same, in the payload's bytes",
    "closed_book": "closed book (question only)",
    "shuffled_latent": "another example's latent",
    "zero_latent": "a latent of zeros",
    "embedding_replay": "the text's own embeddings as the prefix",
    "first_words": "first five words, no model",
}

BY_BITS = {
    "latent_bits": "latent",
    "byte_budget_bits": "text cut to the bytes of",
    "selective_context_bytes_bits": "the words least expected, in the bytes of",
    "bm25_sentences_bytes_bits": "the sentences that match the question, in the bytes of",
}


def load(folder: Path) -> dict[str, Any]:
    """A run's metrics.json, with the folder's name as `label`."""
    metrics: dict[str, Any] = json.loads((folder / "eval" / "metrics.json").read_text())
    return metrics | {"label": folder.name}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def interval(value: dict[str, float] | None) -> str:
    """A share of 1 with its interval, in points."""
    if value is None:
        return "not measured"
    return f"{100 * value['mean']:.1f} [{100 * value['low']:.1f}, {100 * value['high']:.1f}]"


def scores(runs: Sequence[dict[str, Any]]) -> str:
    """F1 of every method, a column for each run and reader."""
    columns = [(run, name) for run in runs for name in run["readers"]]
    rows = [
        [
            label,
            *(interval((r["readers"][name].get(method) or {}).get("f1")) for r, name in columns),
        ]
        for method, label in METHODS.items()
    ]
    for key, label in BY_BITS.items():
        for width in columns[0][0]["readers"][columns[0][1]].get(key, ()):
            cells = [f"{100 * run['readers'][name][key][width]['f1']:.1f}" for run, name in columns]
            rows.append([f"{label} {width} bits", *cells])
    return table(["F1", *(f"{run['label']}: {name}" for run, name in columns)], rows)


def sizes(runs: Sequence[dict[str, Any]]) -> str:
    """Bytes of payloads and of the texts that they stand for."""
    widths = list(runs[0]["bytes"]["payload_mean"])
    rows = [
        [
            run["label"],
            " / ".join(f"{run['bytes']['payload_mean'][width]:.0f}" for width in widths),
            f"{run['bytes']['text_utf8_mean']:.0f}",
            f"{run['bytes']['text_brotli_mean']:.0f}",
        ]
        for run in runs
    ]
    head = f"payload at {' / '.join(widths)} bits"
    return table(["bytes per example", head, "text, UTF-8", "text, brotli"], rows)


FORMS = {
    "text_utf8_mean": "text, UTF-8",
    "text_zlib_mean": "text, zlib 9",
    "text_zstd_mean": "text, zstd 22",
    "text_brotli_mean": "text, brotli 11",
    "text_zstd_dictionary_mean": "text, zstd 22 with a dictionary",
}


def forms(runs: Sequence[dict[str, Any]]) -> str:
    """Bytes of the same text in every form; a dash where one was not measured."""

    def row(label: str, values: Iterable[float | None], *, digits: int = 0) -> list[str]:
        return [label, *("-" if v is None else f"{v:.{digits}f}" for v in values)]

    rows = [row(label, [run["bytes"].get(key) for run in runs]) for key, label in FORMS.items()]
    for name in dict.fromkeys(name for run in runs for name in run["readers"]):
        values = [(run["bytes"].get("text_coded_mean") or {}).get(name) for run in runs]
        rows.append(row(f"text, coded by {name}", values, digits=1))
    return table(["bytes per example", *(run["label"] for run in runs)], rows)


def unpacking(runs: Sequence[dict[str, Any]]) -> str:
    """What texts that a reader coded cost a receiver, in milliseconds to the first token."""
    rows = []
    for run in runs:
        for name, entry in ((run.get("coded_text") or {}).get("readers") or {}).items():
            times = (entry or {}).get("first_token_ms_p50") or {}
            keys = ("payload", "coded_text", "unpacking")
            cells = ["-" if times.get(key) is None else f"{times[key]:.1f}" for key in keys]
            rows.append([f"{run['label']}: {name}", *cells])
    head = ["ms to the first token", "payload", "text coded by the reader", "of that, unpacking"]
    return table(head, rows)


def verdicts(runs: Sequence[dict[str, Any]]) -> str:
    """Every hypothesis with its value, interval and verdict."""

    def cell(entry: dict[str, Any]) -> str:
        if entry["value"] is None:
            return "not measured"
        low, high = entry["low"], entry["high"]
        bounds = "" if low is None else f" [{low:.3f}, {high:.3f}]"
        return f"{entry['value']:.3f}{bounds}: {entry['verdict']}"

    rows = []
    for name in runs[0]["hypotheses"]:
        entries = [run["hypotheses"].get(name) or {"value": None, "bar": None} for run in runs]
        bars = {entry["bar"] for entry in entries} - {None}
        cells = [cell(entry) for entry in entries]
        rows.append([name, " ".join(map(str, sorted(bars))), *cells])
    return table(["hypothesis", "bar", *(run["label"] for run in runs)], rows)


def times(runs: Sequence[dict[str, Any]]) -> str:
    """Median times at batch 1, in milliseconds."""
    rows = []
    for run in runs:
        for name, methods in run["readers"].items():
            cells = [
                f"{methods[method][key]:.1f}"
                for key in ("prefill_ms_p50", "end_to_end_ms_p50")
                for method in ("text", "latent")
            ]
            rows.append([f"{run['label']}: {name}", *cells])
    head = [
        "ms",
        "prefill, text",
        "prefill, latent",
        "to the answer, text",
        "to the answer, latent",
    ]
    return table(head, rows)


def origins(runs: Sequence[dict[str, Any]]) -> str:
    """The runs that each column comes from."""
    rows = [
        [
            run["label"],
            run["run"]["preset"],
            str(run["run"]["seed"]),
            str(run["examples"]),
            str(run["run"]["commit"])[:12],
            f"{run['run']['wall_seconds']:.0f}",
            run["run"]["device"],
        ]
        for run in runs
    ]
    head = ["run", "preset", "seed", "examples", "commit", "all, s", "device"]
    return table(head, rows)


def main() -> None:
    """Print all tables of the runs that the command line names."""
    runs = [load(Path(argument)) for argument in sys.argv[1:]]
    if not runs:
        sys.exit("usage: results_tables.py RUN [RUN ...]")
    parts = (scores, sizes, forms, unpacking, verdicts, times, origins)
    print("\n\n".join(part(runs) for part in parts))


if __name__ == "__main__":
    main()
