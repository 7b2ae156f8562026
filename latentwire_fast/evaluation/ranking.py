"""Scores of rankings, as TREC's own program defines them; a test compares them with a library's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from latentwire_fast.evaluation.metrics import reciprocal_rank


def mrr(ranked: Sequence[str], grades: Mapping[str, int], *, limit: int, relevant: int) -> float:
    """1 / rank of the first passage with at least the grade `relevant` among the `limit` first,
    else 0."""
    good = {passage for passage, grade in grades.items() if grade >= relevant}
    return reciprocal_rank(ranked, good, limit=limit)


def ndcg(ranked: Sequence[str], grades: Mapping[str, int], *, limit: int) -> float:
    """Normalised discounted cumulative gain of the `limit` first, 0..1: the gain is the grade, the
    best order that the judged passages could have is 1. 0 where no passage is relevant."""
    best = _gain(sorted(grades.values(), reverse=True)[:limit])
    return _gain([grades.get(passage, 0) for passage in ranked[:limit]]) / best if best else 0.0


def _gain(grades: Sequence[int]) -> float:
    return sum(max(0, grade) / math.log2(rank + 1) for rank, grade in enumerate(grades, start=1))
