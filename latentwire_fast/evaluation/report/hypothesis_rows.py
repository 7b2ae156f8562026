"""The hypotheses as a report shows them: claim, value, bar, verdict, and what that rests on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from latentwire_fast.evaluation.report.formatting import TIMES, Cell, cell, number


@dataclass(frozen=True)
class Hypothesis:
    """One claim that every report tests.

    Attributes:
        claim: the claim in words.
        quantity: what the value is.
        unit: `points` for a difference of F1, or `ratio`.
        side: whether the value must be at least or at most the bar.
        needs: what must be there for it to be measured.
        also: how it can fail with a value that meets the bar.
    """

    claim: str
    quantity: str
    unit: Literal["points", "ratio"]
    side: Literal["least", "most"]
    needs: str
    also: str = ""


_READS = "readers that do the task from text"
HYPOTHESES = {
    "H1": Hypothesis(
        f"The latent loses at most 2 points of F1 against text, at 4{TIMES} fewer prefix positions",
        "latent F1 minus text F1",
        "points",
        "least",
        _READS,
        f"the prefix is not 4{TIMES} shorter",
    ),
    "H2": Hypothesis(
        "The latent is at least 3 points of F1 above the prompt cut to as many positions",
        "latent F1 minus the best token budget's F1",
        "points",
        "least",
        "latent and token-budget scores",
    ),
    "H3": Hypothesis(
        f"Gold answers cost at most 1.05{TIMES} the NLL per token that they cost with text",
        "latent NLL over text NLL",
        "ratio",
        "most",
        _READS,
    ),
    "H4": Hypothesis(
        "Rescoring the readers' candidates gains at least 1.5 points of F1 over the better reader",
        "joint F1 minus the best single F1",
        "points",
        "least",
        f"two {_READS}",
    ),
    "H5": Hypothesis(
        "Prefill takes less time and the payload fewer bytes than the text",
        "text prefill time over latent prefill time",
        "ratio",
        "least",
        "timings",
        "the payload is not smaller than the text",
    ),
    "H6": Hypothesis(
        "The payload is smaller than the brotli-compressed text at 95% of the text's F1",
        "payload bytes over brotli bytes",
        "ratio",
        "most",
        _READS,
        "no bit width keeps 95% of every reader's text F1",
    ),
    "H7": Hypothesis(
        "A reader that the encoder never saw comes within 5 points of F1 with an adapter alone",
        "latent F1 minus text F1 of the added reader",
        "points",
        "least",
        "a run that adds a reader",
    ),
}


def verdict(metrics: Mapping[str, Any], key: str) -> str:
    """`pass`, `fail` or `not measured`."""
    return str(_found(metrics, key).get("verdict") or "not measured")


def hypothesis_row(metrics: Mapping[str, Any], key: str) -> dict[str, Any]:
    """What both templates print of one hypothesis."""
    hypothesis, found = HYPOTHESES[key], _found(metrics, key)
    is_points = hypothesis.unit == "points"

    def show(part: Any) -> Cell:
        scale, digits = (100, 1) if is_points else (1, 2)
        return cell(part, scale=scale, digits=digits, signed=is_points)

    value = {"mean": found.get("value"), "low": found.get("low"), "high": found.get("high")}
    return {
        "name": key,
        "claim": hypothesis.claim,
        "quantity": hypothesis.quantity + _circumstance(found),
        "verdict": verdict(metrics, key),
        "value": show(value),
        "bar": show(found.get("bar")).text,
        "unit": " points" if is_points else TIMES,
        "explanation": _explain(hypothesis, verdict(metrics, key), found),
    }


def _found(metrics: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    return (metrics.get("hypotheses") or {}).get(key) or {}


def _circumstance(found: Mapping[str, Any]) -> str:
    """At what compression, or at which bit width, the value was measured."""
    if found.get("position_ratio") is not None:
        return f" at {number(found['position_ratio'])}{TIMES} fewer positions"
    return f" at {found['bits']} bits" if found.get("bits") is not None else ""


def _explain(hypothesis: Hypothesis, outcome: str, found: Mapping[str, Any]) -> str:
    """What the verdict rests on: another condition, or where the bar lies in the interval."""
    if outcome not in ("pass", "fail"):
        return f"Not measured: it needs {hypothesis.needs}."
    value, low, high, bar = (found.get(part) for part in ("value", "low", "high", "bar"))
    if outcome == "fail" and hypothesis.also and value is not None and bar is not None:
        meets_bar = value >= bar if hypothesis.side == "least" else value <= bar
        if meets_bar:
            return f"Fails although the value meets the bar: {hypothesis.also}."
    word = "Holds" if outcome == "pass" else "Fails"
    if low is None or high is None or bar is None:
        return f"{word} by the point estimate; no interval was measured."
    if low < bar < high:
        return f"{word} on average, but the interval holds the bar: more examples may overturn it."
    return f"{word} over the whole interval."
