"""Scores beyond those of `metrics.json`, for summaries, labels and rankings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from latentwire_fast.evaluation.metrics import ROUGE_TYPES, accuracy, rouge

EXTRA_SCORES = {
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "accuracy": "Accuracy",
    "mrr_at_10": "MRR@10",
}


Means = Mapping[str, Mapping[str, Mapping[str, float]]]  # by reader, method and metric


def extra_scores(predictions: Sequence[Mapping[str, Any]]) -> Means:
    """Means of `EXTRA_SCORES` over the records of predictions.jsonl, 0..1.

    Accuracy compares with the first answer, up to case and outer white space. MRR@10 ranks the
    vocabulary as the answer's first token; methods that were decoded only have none.
    """
    collected: dict[str, dict[str, list[tuple[Mapping[str, Any], Sequence[str]]]]] = {}
    for record in predictions:
        for reader, methods in (record.get("readers") or {}).items():
            of_reader = collected.setdefault(reader, {})
            for method, entry in methods.items():
                if entry and "prediction" in entry and record.get("answers"):
                    of_reader.setdefault(method, []).append((entry, record["answers"]))
    return {
        reader: {method: _means(pairs) for method, pairs in methods.items()}
        for reader, methods in collected.items()
    }


def _means(pairs: Sequence[tuple[Mapping[str, Any], Sequence[str]]]) -> dict[str, float]:
    texts = [entry["prediction"] for entry, _ in pairs]
    scores = [rouge(text, answers) for text, (_, answers) in zip(texts, pairs, strict=True)]
    means = {kind: sum(s[kind] for s in scores) / len(scores) for kind in ROUGE_TYPES}
    means["accuracy"] = accuracy(texts, [answers[0] for _, answers in pairs])
    ranks = [entry.get("first_token_reciprocal_rank") for entry, _ in pairs]
    known = [rank for rank in ranks if rank is not None]
    if known:
        means["mrr_at_10"] = sum(known) / len(known)
    return means
