"""The same text in every form: its bytes, and what each costs a receiver until its first token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from latentwire_fast.evaluation.methods.base import sorted_widths
from latentwire_fast.evaluation.report.formatting import MISSING, number, ratio, size

# The general compressors: key in `bytes` of metrics.json, and what it is called.
COMPRESSORS = {
    "text_utf8_mean": "text, UTF-8",
    "text_zlib_mean": "text, zlib 9",
    "text_zstd_mean": "text, zstd 22",
    "text_brotli_mean": "text, brotli 11",
    "text_zstd_dictionary_mean": "text, zstd 22 with a dictionary",
}


def text_bytes(metrics: Mapping[str, Any]) -> dict[str, Any] | None:
    """The table and its notes; None for metrics from before there was one."""
    coded = metrics.get("coded_text")
    if coded is None:
        return None
    return {
        "rows": [*_rows(metrics)],
        "costs": [*_costs(coded)],
        "timed": _timed(coded),
        "notes": [*_notes(coded)],
    }


def _timed(coded: Mapping[str, Any]) -> str:
    """How many texts the times are of."""
    counts = {entry["sample"]["examples"] for entry in coded["readers"].values() if entry}
    return f"{max(counts, default=0)} texts"


def _rows(metrics: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    sizes = metrics.get("bytes") or {}
    utf8 = sizes.get("text_utf8_mean")
    reasons = metrics["coded_text"].get("not_measured") or {}

    def row(label: str, value: float | None, *, digits: int = 0, note: str = "") -> dict[str, Any]:
        if value is None:
            cells = {"bytes": MISSING, "of_utf8": MISSING, "bits": MISSING}
            return {"label": label, **cells, "note": note or "not measured", "is_ours": False}
        bits = number(8 * value / utf8, digits=2) if utf8 else MISSING
        cells = {"bytes": number(value, digits=digits), "of_utf8": ratio(value, utf8), "bits": bits}
        return {"label": label, **cells, "note": "", "is_ours": False}

    for key, label in COMPRESSORS.items():
        name = key.removeprefix("text_").removesuffix("_mean")
        yield row(label, sizes.get(key), note=reasons.get(name, ""))
    for name, value in (sizes.get("text_coded_mean") or {}).items():
        yield row(f"text, coded by {name}", value, digits=1)
    run_bits = str((metrics.get("latent") or {}).get("bits"))
    payloads = sizes.get("payload_mean") or {}
    for bits in sorted_widths(payloads):
        yield row(f"payload, {bits} bits", payloads[bits]) | {"is_ours": bits == run_bits}


def _costs(coded: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """Per reader, how long a receiver takes to an answer's first token."""
    for name, entry in coded["readers"].items():
        times = (entry or {}).get("first_token_ms_p50") or {}
        if times.get("payload") is None or times.get("coded_text") is None:
            continue
        yield {
            "reader": name,
            "payload": number(times["payload"]),
            "coded_text": number(times["coded_text"]),
            "unpacking": number(times["unpacking"]),
            "times": ratio(times["coded_text"], times["payload"], digits=0),
            "tokens": number(entry["tokens_mean"], digits=0),
        }


def _notes(coded: Mapping[str, Any]) -> Iterator[str]:
    dictionary = coded.get("zstd_dictionary")
    if dictionary:
        yield (
            f"The dictionary of zstd has {size(dictionary['bytes'])} bytes, made of "
            f"{size(dictionary['texts'])} training texts. Both sides have it, so it does not "
            "count; nor do a reader's weights."
        )
    for name, entry in coded["readers"].items():
        if entry is None:
            continue
        sample, minus = entry["sample"], "\N{MINUS SIGN}"
        text = (
            f"Coded by {name}: {minus}log2 p of the text's tokens and of its end, over 8. Of "
            f"{sample['examples']} texts that were really coded, {sample['decoded_equal']} came "
            f"back the same, from {number(sample['bytes_mean'])} bytes ({minus}log2 p over 8: "
            f"{number(sample['information_mean'])})."
        )
        if entry["lost"]:
            text += f" The tokenizer loses something of {entry['lost']} of the texts."
        yield text
