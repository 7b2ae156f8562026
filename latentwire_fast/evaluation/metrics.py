"""Scores of answers: official SQuAD v1.1 rules, likelihoods, rankings, bootstrap intervals.

Scores of single examples lie in 0..1; a set's score is their mean with a percentile bootstrap
interval (examples are resampled; systems compared on the same examples are resampled together).
Examples of one cluster, such as the questions on one passage, are resampled together too: they are
not independent, and intervals that take them for it are too narrow.

    >>> f1("the red lamp.", ["red lamp", "lamp"])
    1.0
    >>> mean_interval([1.0, 0.0, 1.0, 1.0], seed=0).mean
    0.75
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from latentwire_fast.evaluation.languages import normalize_answer

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

# Resampled values held at once (8 bytes each): all 2,000 x 6,384 of a SQuAD file would take 100 MB.
_RESAMPLE_ELEMENTS = 2_000_000
ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")


class Interval(NamedTuple):
    """A point estimate with the bounds of its bootstrap interval. `_asdict()` is its JSON form."""

    mean: float
    low: float
    high: float


# --- answers -------------------------------------------------------------------------------------


def exact_match(prediction: str, answers: Sequence[str], language: str = "en") -> float:
    """1.0 if the prediction equals any answer after `normalize_answer`, else 0.0.

    Raises:
        ValueError: no answers.
    """
    return _best(_exact_match, prediction, answers, language)


def f1(prediction: str, answers: Sequence[str], language: str = "en") -> float:
    """Token-overlap F1 against the best answer (official SQuAD v1.1 script), 0..1.

    Args:
        language: whose rules say what a token is (`languages.py`).

    The answer `""` stands for "no answer" and follows the v2.0 script: only an empty prediction is
    correct.

    Raises:
        ValueError: no answers.
    """
    return _best(_f1, prediction, answers, language)


def accuracy(predictions: Sequence[str], labels: Sequence[str]) -> float:
    """Share of predictions equal to their label, up to case and outer white space.

    Not `exact_match`: its normalisation deletes the article, and so the label, "A".

    Raises:
        ValueError: no labels, or not as many as predictions.
    """
    pairs = list(zip(predictions, labels, strict=True))
    if not pairs:
        raise ValueError("accuracy: no predictions")
    return sum(p.strip().lower() == gold.strip().lower() for p, gold in pairs) / len(pairs)


def rouge(prediction: str, answers: Sequence[str]) -> dict[str, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L F-measures (no stemming), each the best over the answers, 0..1.

    Raises:
        ValueError: no answers.
    """
    if not answers:
        raise ValueError("rouge: no answers to compare with")
    scores = [_rouge_scorer().score(answer, prediction) for answer in answers]
    return {kind: max(s[kind].fmeasure for s in scores) for kind in ROUGE_TYPES}


def _best(
    score: Callable[[str, str, str], float],
    prediction: str,
    answers: Sequence[str],
    language: str,
) -> float:
    if not answers:
        raise ValueError("no answers to compare with; an unanswerable question has the answer ''")
    return max(score(prediction, answer, language) for answer in answers)


def _exact_match(prediction: str, answer: str, language: str) -> float:
    return float(normalize_answer(prediction, language) == normalize_answer(answer, language))


def _f1(prediction: str, answer: str, language: str) -> float:
    if not answer:
        return _exact_match(prediction, answer, language)
    predicted = normalize_answer(prediction, language).split()
    expected = normalize_answer(answer, language).split()
    common = (Counter(predicted) & Counter(expected)).total()
    if common == 0:
        return 0.0
    precision, recall = common / len(predicted), common / len(expected)
    return 2 * precision * recall / (precision + recall)


@cache
def _rouge_scorer() -> RougeScorer:
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(list(ROUGE_TYPES), use_stemmer=False)


# --- rankings and likelihoods --------------------------------------------------------------------


def first_token_hit(ranked_ids: Sequence[int], gold_id: int, *, k: int) -> float:
    """FirstTok@k of one example: 1.0 if the gold token is among the `k` first of the ranked ids.

    Raises:
        ValueError: fewer than `k` ids were ranked, which would quietly understate the score.
    """
    if not 1 <= k <= len(ranked_ids):
        raise ValueError(f"first_token_hit: k={k}, but {len(ranked_ids)} ids are ranked")
    return float(gold_id in list(ranked_ids[:k]))


def reciprocal_rank(ranked: Sequence[Any], relevant: set[Any], *, limit: int = 10) -> float:
    """1 / rank of the first relevant item within `limit`, else 0.0; MRR@limit is its mean."""
    for rank, item in enumerate(ranked[:limit], start=1):
        if item in relevant:
            return 1.0 / rank
    return 0.0


def uniform_nll(vocab_size: int) -> float:
    """ln V: what a uniform guess costs per token. A text baseline above it is a broken metric."""
    return math.log(vocab_size)


# --- collapse ------------------------------------------------------------------------------------


def distinct_shares(predictions: Sequence[str]) -> list[float]:
    """Per prediction, 1 / (how often it occurs): the sum is the number of distinct predictions.

    The mean is the diversity, distinct / n; as a mean over examples it has a bootstrap interval.
    """
    counts = Counter(predictions)
    return [1.0 / counts[p] for p in predictions]


def empty_rate(predictions: Sequence[str]) -> float:
    """Share of predictions that hold nothing but white space.

    Raises:
        ValueError: no predictions.
    """
    if not predictions:
        raise ValueError("empty_rate: no predictions")
    return sum(not p.strip() for p in predictions) / len(predictions)


# --- intervals -----------------------------------------------------------------------------------


def mean_interval(
    values: Sequence[float],
    *,
    seed: int,
    resamples: int = 2000,
    confidence: float = 0.95,
    clusters: Sequence[Hashable] | None = None,
) -> Interval:
    """Mean over examples and its percentile bootstrap interval.

    Args:
        clusters: per example, what it is of: examples of one cluster are resampled together.

    Raises:
        ValueError: no values.
    """
    array = np.asarray(values, dtype=np.float64)
    return _interval(array, np.ones_like(array), seed, resamples, confidence, clusters)


def paired_interval(
    a: Sequence[float],
    b: Sequence[float],
    *,
    seed: int,
    resamples: int = 2000,
    confidence: float = 0.95,
    clusters: Sequence[Hashable] | None = None,
) -> Interval:
    """Mean of `a - b` over the same examples, resampled together.

    Raises:
        ValueError: no values, or lists of different lengths.
    """
    left, right = _paired(a, b, name="paired_interval")
    return mean_interval(
        left - right, seed=seed, resamples=resamples, confidence=confidence, clusters=clusters
    )


def ratio_interval(
    numerators: Sequence[float],
    denominators: Sequence[float],
    *,
    seed: int,
    resamples: int = 2000,
    confidence: float = 0.95,
    clusters: Sequence[Hashable] | None = None,
) -> Interval:
    """Ratio of sums over the same examples, resampled together.

    NLL per token is (NLL sums, token counts); the ratio of two systems' NLL per token on the same
    gold tokens is (NLL sums of one, NLL sums of the other).

    Raises:
        ValueError: no values, lists of different lengths, or a denominator that is not positive.
    """
    top, bottom = _paired(numerators, denominators, name="ratio_interval")
    if top.size and bottom.min() <= 0:
        raise ValueError(
            f"ratio_interval: denominators must be positive, index {int(bottom.argmin())} is "
            f"{bottom.min():g}"
        )
    return _interval(top, bottom, seed, resamples, confidence, clusters)


def _paired(a: Sequence[float], b: Sequence[float], *, name: str) -> tuple[np.ndarray, np.ndarray]:
    left, right = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if left.shape != right.shape or left.ndim != 1:
        raise ValueError(
            f"{name}: needs two lists of one length, got {left.shape} and {right.shape}"
        )
    return left, right


def _sums_by(clusters: Sequence[Hashable], *values: np.ndarray) -> list[np.ndarray]:
    """Sums over each cluster, in the order in which the clusters first occur."""
    number_of: dict[Hashable, int] = {}
    numbers = [number_of.setdefault(cluster, len(number_of)) for cluster in clusters]
    return [np.bincount(numbers, weights=value, minlength=len(number_of)) for value in values]


def _interval(
    top: np.ndarray,
    bottom: np.ndarray,
    seed: int,
    resamples: int,
    confidence: float,
    clusters: Sequence[Hashable] | None,
) -> Interval:
    if clusters is not None and top.size:
        top, bottom = _sums_by(clusters, top, bottom)
    n = top.size
    if n == 0:
        raise ValueError("bootstrap interval of no values: nothing was evaluated")
    if not (np.isfinite(top).all() and np.isfinite(bottom).all()):
        raise ValueError("bootstrap interval of values that are not all finite")
    estimate = float(_ratio_of_sums(top, bottom))
    if n == 1:  # nothing to resample: the interval is the value, and scipy refuses it
        return Interval(estimate, estimate, estimate)
    from scipy import stats  # one second to import

    result = stats.bootstrap(
        (top, bottom),
        _ratio_of_sums,
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, _RESAMPLE_ELEMENTS // n),
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    low, high = result.confidence_interval
    return Interval(estimate, float(low), float(high))


def _ratio_of_sums(top: np.ndarray, bottom: np.ndarray, axis: int = -1) -> np.ndarray:
    return top.sum(axis=axis) / bottom.sum(axis=axis)
