"""Scores beyond those of `metrics.json`, for summaries, labels and rankings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from latentwire_fast.evaluation.metrics import ROUGE_TYPES, accuracy, rouge
from latentwire_fast.evaluation.report.intervals import Bootstrap

EXTRA_SCORES = {
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "accuracy": "Accuracy",
    "mrr_at_10": "MRR@10",
}


# By reader, method and metric: a mean, or one with its bounds.
Means = Mapping[str, Mapping[str, Mapping[str, Any]]]
Answered = tuple[int, Mapping[str, Any], Sequence[str]]  # record's number, what was said, answers


def extra_scores(
    predictions: Sequence[Mapping[str, Any]], bootstrap: Bootstrap | None = None
) -> Means:
    """Means of `EXTRA_SCORES` over the records of predictions.jsonl, 0..1.

    Accuracy compares with the first answer, up to case and outer white space. MRR@10 ranks the
    vocabulary as the answer's first token; methods that were decoded only have none.

    Args:
        bootstrap: of these records; adds the bounds.
    """
    collected: dict[str, dict[str, list[Answered]]] = {}
    for i, record in enumerate(predictions):
        for reader, methods in (record.get("readers") or {}).items():
            of_reader = collected.setdefault(reader, {})
            for method, entry in methods.items():
                if entry and "prediction" in entry and record.get("answers"):
                    of_reader.setdefault(method, []).append((i, entry, record["answers"]))
    return {
        reader: {
            method: _means(answered, len(predictions), bootstrap)
            for method, answered in methods.items()
        }
        for reader, methods in collected.items()
    }


def _means(
    answered: Sequence[Answered], count: int, bootstrap: Bootstrap | None
) -> dict[str, float | dict[str, float] | None]:
    values: dict[str, list[float | None]] = {key: [None] * count for key in EXTRA_SCORES}
    for i, entry, answers in answered:
        text = entry["prediction"]
        rouges = rouge(text, answers)
        for kind in ROUGE_TYPES:
            values[kind][i] = rouges[kind]
        values["accuracy"][i] = accuracy([text], [answers[0]])
        values["mrr_at_10"][i] = entry.get("first_token_reciprocal_rank")
    found = {key: [v for v in of_key if v is not None] for key, of_key in values.items()}
    if bootstrap is None:
        return {key: sum(known) / len(known) for key, known in found.items() if known}
    return {key: bootstrap.interval(values[key]) for key, known in found.items() if known}
