"""Scores of each set of a mixture, by the set's own score beside exact match and F1."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from latentwire_fast.config.schema import RunConfig
from latentwire_fast.data.examples import Example
from latentwire_fast.data.source_names import metrics_of_sets
from latentwire_fast.evaluation.method_result import MethodResult
from latentwire_fast.evaluation.metrics import accuracy, mean_interval, rouge


def _accuracy(prediction: str, answers: Sequence[str]) -> float:
    return accuracy([prediction], answers[:1])


def _rouge_l(prediction: str, answers: Sequence[str]) -> float:
    return rouge(prediction, answers)["rougeL"]


# Scores that a set may name (`DataSet.metric`) beside F1, which every method has.
SCORES: dict[str, Callable[[str, Sequence[str]], float]] = {
    "accuracy": _accuracy,
    "rougeL": _rouge_l,
}
METRIC_NAMES = {"f1": "F1", "accuracy": "Accuracy", "rougeL": "ROUGE-L"}  # for people


def set_scores(
    config: RunConfig,
    examples: Sequence[Example],
    readers: Mapping[str, Mapping[str, MethodResult]],
) -> dict[str, Any]:
    """The entry `sets` of metrics.json: by set, how many examples and contexts, its own score's
    name, and by reader and method the scores with their intervals.

    Empty where there is one set, known by its F1.

    Args:
        readers: results by reader and method.
    """
    rows: dict[str, list[int]] = {}
    for i, example in enumerate(examples):
        rows.setdefault(example.set_name, []).append(i)
    if list(rows) == [""]:  # of no source
        return {}
    own = metrics_of_sets(config.data.eval_source or config.data.source)
    if len(rows) < 2 and all(own.get(name, "f1") == "f1" for name in rows):
        return {}
    found = {}
    for name, numbers in sorted(rows.items()):
        of_set = [examples[i] for i in numbers]
        contexts = [example.context for example in of_set]
        options = {
            "seed": config.seed,
            "resamples": config.evaluation.resamples,
            "clusters": contexts,
        }
        metric = own.get(name, "f1")
        found[name] = {
            "examples": len(of_set),
            "contexts": len(set(contexts)),
            "metric": metric,
            "readers": {
                reader: {
                    method: _of_method(result, numbers, of_set, metric, options)
                    for method, result in methods.items()
                }
                for reader, methods in readers.items()
            },
        }
    return found


def _of_method(
    result: MethodResult,
    rows: Sequence[int],
    examples: Sequence[Example],
    metric: str,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    values = {"f1": [result.f1[i] for i in rows], "em": [result.em[i] for i in rows]}
    if metric in SCORES:
        values[metric] = [
            SCORES[metric](result.predictions[i], example.answers)
            for i, example in zip(rows, examples, strict=True)
        ]
    return {name: mean_interval(v, **options)._asdict() for name, v in values.items()}
