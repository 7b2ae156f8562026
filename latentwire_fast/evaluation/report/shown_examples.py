"""The examples that a report shows: as many bad ones as good ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from latentwire_fast.evaluation.methods.base import bits_key, by_kind, sorted_widths
from latentwire_fast.evaluation.report.formatting import MISSING, size

Records = Sequence[Mapping[str, Any]]

EXAMPLES = 3  # good ones, and as many bad ones
CONTEXT_CHARS, ANSWER_CHARS = 900, 160


def choose_examples(predictions: Records, metrics: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Good examples (every reader's latent answer is correct), and the worst.

    Good ones come first where the token budget fails, bad ones first where the text succeeds: there
    the latent makes the difference. Ties keep the order of the data.
    """

    def score(record: Mapping[str, Any], method: str, key: str = "f1") -> float:
        found = [
            (methods.get(method) or {}).get(key) or 0.0
            for methods in (record.get("readers") or {}).values()
        ]
        return sum(found) / len(found) if found else 0.0

    good = [r for r in predictions if score(r, "latent", "em") == 1]
    bad = [r for r in predictions if score(r, "latent") < 1]
    good = sorted(good, key=lambda r: score(r, "token_budget"))
    bad = sorted(bad, key=lambda r: (score(r, "latent"), -score(r, "text")))
    bits = str((metrics.get("latent") or {}).get("bits"))
    return {
        "good": [_example(record, bits) for record in good[:EXAMPLES]],
        "bad": [_example(record, bits) for record in bad[:EXAMPLES]],
    }


def _example(record: Mapping[str, Any], bits: str) -> dict[str, Any]:
    readers = record.get("readers") or {}
    rows = []
    methods = by_kind()
    for key, method in methods.items():
        answers = [entries.get(key) for entries in readers.values()]
        if any(answers):
            rows.append(_row(method.label, answers, is_ours=method.kind == "ours"))
    ours = {key: m for key, m in methods.items() if m.by_bits and m.kind == "ours"}
    for key, method in ours.items():
        widths = {width for r in readers.values() for width in r.get(bits_key(key)) or ()}
        for width in sorted_widths(widths):
            answers = [(r.get(bits_key(key)) or {}).get(width) for r in readers.values()]
            if width != bits and any(answers):
                rows.append(_row(f"{method.label}, {width} bits", answers))
    context = record.get("context") or ""
    clipped = max(0, len(context) - CONTEXT_CHARS)
    return {
        "id": record.get("id", ""),
        "context": context[:CONTEXT_CHARS],
        "clipped": clipped,
        "question": record.get("question") or "",
        "gold": " / ".join(record.get("answers") or ()),
        "sizes": _sizes(record, bits),
        "readers": list(readers),
        "rows": rows,
        "joint": _answer(record.get("joint")) if record.get("joint") else None,
    }


def _sizes(record: Mapping[str, Any], bits: str) -> list[tuple[str, str, float, bool]]:
    """(label, bytes, percent of the largest, whether it is the payload) of what may be sent."""
    sizes = {
        "payload": (record.get("payload_bytes") or {}).get(bits),
        "text, brotli": record.get("text_brotli_bytes"),
        "text, UTF-8": record.get("text_utf8_bytes"),
    }
    known = {label: count for label, count in sizes.items() if count}
    largest = max(known.values(), default=1)
    return [
        (label, f"{size(count)} bytes", 100 * count / largest, label == "payload")
        for label, count in known.items()
    ]


def _row(label: str, answers: Sequence[Any], *, is_ours: bool = False) -> dict[str, Any]:
    return {"label": label, "answers": [_answer(a) for a in answers], "is_ours": is_ours}


def _answer(found: Mapping[str, Any] | None) -> dict[str, str]:
    if found is None:
        return {"text": MISSING, "grade": "none"}
    f1 = found.get("f1") or 0.0
    grade = "correct" if f1 == 1 or found.get("em") == 1 else "partial" if f1 > 0 else "wrong"
    text = (found.get("prediction") or "").strip() or "(empty)"
    if len(text) > ANSWER_CHARS:
        text = text[:ANSWER_CHARS] + "\N{HORIZONTAL ELLIPSIS}"
    return {"text": text, "grade": grade}
