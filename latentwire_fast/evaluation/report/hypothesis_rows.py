"""The hypotheses as a report shows them: claim, value, bar, verdict, and what that rests on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from latentwire_fast.evaluation.hypotheses.base import Hypothesis, hypotheses
from latentwire_fast.evaluation.report.formatting import TIMES, Cell, cell


def verdict(metrics: Mapping[str, Any], key: str) -> str:
    """`pass`, `fail` or `not measured`."""
    return str(_found(metrics, key).get("verdict") or "not measured")


def hypothesis_row(metrics: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The row of one hypothesis, as both templates print it."""
    hypothesis, found = hypotheses()[key], _found(metrics, key)
    is_points = hypothesis.unit == "points"

    def show(part: Any) -> Cell:
        scale, digits = (100, 1) if is_points else (1, 2)
        return cell(part, scale=scale, digits=digits, signed=is_points)

    value = {"mean": found.get("value"), "low": found.get("low"), "high": found.get("high")}
    return {
        "name": key,
        "claim": hypothesis.claim,
        "quantity": hypothesis.quantity + hypothesis.circumstance(found),
        "verdict": verdict(metrics, key),
        "value": show(value),
        "bar": show(found.get("bar")).text,
        "unit": " points" if is_points else TIMES,
        "explanation": _explain(hypothesis, verdict(metrics, key), found),
    }


def _found(metrics: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    return (metrics.get("hypotheses") or {}).get(key) or {}


def _explain(hypothesis: Hypothesis, judged: str, found: Mapping[str, Any]) -> str:
    """The ground of the verdict: another condition, or where the bar lies in the interval."""
    if judged not in ("pass", "fail"):
        return f"Not measured: it needs {hypothesis.needs}."
    value, low, high, bar = (found.get(part) for part in ("value", "low", "high", "bar"))
    fails_otherwise = judged == "fail" and hypothesis.also
    if fails_otherwise and value is not None and bar is not None and hypothesis.meets(value, bar):
        return f"Fails although the value meets the bar: {hypothesis.also}."
    word = "Holds" if judged == "pass" else "Fails"
    if low is None or high is None or bar is None:
        return f"{word} by the point estimate; no interval was measured."
    if low < bar < high:
        return f"{word} on average, but the interval holds the bar: more examples may overturn it."
    return f"{word} over the whole interval."
