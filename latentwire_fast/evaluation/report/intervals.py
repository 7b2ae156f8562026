"""Intervals of the scores that `metrics.json` has as plain means, from the predictions.

The examples on one context are resampled together, as everywhere. One set of resamples serves all
scores, so that hundreds of intervals cost little.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from latentwire_fast.evaluation.languages import normalize_answer
from latentwire_fast.evaluation.methods.base import methods_by_bits

RESAMPLES = 2000
SAME = 1e-6  # a mean that differs more from the stored one is of other examples

Records = Sequence[Mapping[str, Any]]


class Bootstrap:
    """Percentile intervals (95%) of means over the records of predictions.jsonl."""

    def __init__(self, records: Records, *, seed: int) -> None:
        number_of: dict[Any, int] = {}
        keys = [record.get("context") or record.get("id") or i for i, record in enumerate(records)]
        self._context_of = np.array([number_of.setdefault(key, len(number_of)) for key in keys])
        self._contexts = n = len(number_of)
        rng = np.random.default_rng(seed)
        drawn = rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES) if n else np.zeros((1, 0))
        self._drawn = drawn.astype(np.float32)  # how often each resample has each context

    def interval(self, values: Sequence[float | None]) -> dict[str, float] | None:
        """The mean of one value per record, and its bounds. None: the record has none."""
        there = np.array([value is not None for value in values], dtype=bool)
        if not there.any():
            return None
        numbers = np.array([value for value in values if value is not None], dtype=np.float64)
        contexts = self._context_of[there]
        sums, counts = (
            self._drawn @ np.bincount(contexts, weights, self._contexts).astype(np.float32)
            for weights in (numbers, np.ones_like(numbers))
        )
        low, high = np.percentile(sums[counts > 0] / counts[counts > 0], (2.5, 97.5))
        return {"mean": float(numbers.mean()), "low": float(low), "high": float(high)}

    def around(self, stored: Any, values: Sequence[float | None]) -> Any:
        """A stored mean with the bounds of these values, if it is their mean; else as it is."""
        if stored is None or isinstance(stored, Mapping):
            return stored
        found = self.interval(values)
        if found is None or abs(found["mean"] - stored) > SAME:
            return stored
        return {**found, "mean": stored}


def with_intervals(
    metrics: Mapping[str, Any], predictions: Records, bootstrap: Bootstrap
) -> dict[str, Any]:
    """`metrics` with bounds for the scores at every bit width, and for those of all readers
    together."""
    readers = {
        name: {
            key: _of_widths(scores, name, key, predictions, bootstrap)
            if key in methods_by_bits() and scores
            else scores
            for key, scores in methods.items()
        }
        for name, methods in (metrics.get("readers") or {}).items()
    }
    joint = dict(metrics.get("joint") or {})
    for key, values in _joint_values(predictions, list(readers)):
        joint[key] = bootstrap.around(joint.get(key), values)
    new = {"readers": readers, "joint": joint}
    return {**metrics, **{key: value for key, value in new.items() if metrics.get(key)}}


def _of_widths(
    widths: Mapping[str, Any], reader: str, key: str, predictions: Records, bootstrap: Bootstrap
) -> dict[str, Any]:
    return {
        bits: {
            score: bootstrap.around(
                value,
                [_find(record, "readers", reader, key, bits, score) for record in predictions],
            )
            for score, value in scores.items()
        }
        for bits, scores in widths.items()
    }


def _joint_values(predictions: Records, readers: list[str]) -> Iterator[tuple[str, list[Any]]]:
    """The values per record of the scores of `joint`."""
    yield "f1", [_find(record, "joint", "f1") for record in predictions]
    by_reader = {
        name: [_find(record, "readers", name, "latent", "f1") for record in predictions]
        for name in readers
    }
    complete = [values for values in by_reader.values() if None not in values]
    if not predictions or len(complete) < len(readers) or not readers:
        return
    yield "best_single_f1", max(complete, key=lambda values: sum(values))
    yield "oracle_f1", [max(values) for values in zip(*complete, strict=True)]
    answers = [
        {normalize_answer(_find(r, "readers", n, "latent", "prediction") or "") for n in readers}
        for r in predictions
    ]
    yield "agreement", [float(len(found) == 1) for found in answers]


def _find(record: Mapping[str, Any], *path: str) -> Any:
    found: Any = record
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found
