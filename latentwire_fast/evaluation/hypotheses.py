"""The verdicts on H1-H7: each a value, its paired bootstrap interval, a bar, and pass or fail.

With several readers a hypothesis holds only if it holds for each: the value shown is the worst
reader's.
Differences of F1 are shares of 1 (0.02 is 2 points). What compares with text is *not measured*
where a reader cannot do the task from text either: equal failures would otherwise pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from latentwire_fast.evaluation.method_result import MethodResult, mean
from latentwire_fast.evaluation.metrics import Interval, paired_interval, ratio_interval

Results = Mapping[str, Mapping[str, MethodResult]]
NOT_MEASURED: dict[str, Any] = {
    "value": None,
    "low": None,
    "high": None,
    "bar": None,
    "verdict": "not measured",
}
H1_BAR, H1_POSITIONS = -0.02, 4.0
H2_BAR, H3_BAR, H4_BAR, H5_BAR, H6_BAR, H7_BAR = 0.03, 1.05, 0.015, 1.0, 1.0, -0.05
H6_SHARE = 0.95
SMALLEST_NLL = 1e-9  # fp32 rounds a very sure answer's log-probability to 0


def _entry(interval: Interval, bar: float, passed: bool) -> dict[str, Any]:
    return {
        "value": interval.mean,
        "low": interval.low,
        "high": interval.high,
        "bar": bar,
        "verdict": "pass" if passed else "fail",
    }


def judge(
    measured: Mapping[str, Any],
    results: Results,
    by_bits: Mapping[str, Mapping[int, MethodResult]],
    joint: MethodResult | None,
    *,
    payload_sizes: Mapping[int, list[int]],
    brotli_sizes: list[int],
    unseen: bool,
    seed: int,
    resamples: int,
) -> dict[str, dict[str, Any]]:
    """The `hypotheses` entry of metrics.json.

    Args:
        measured: the rest of metrics.json (for byte means).
        results: per reader and method. by_bits: per reader and bit width.
        payload_sizes, brotli_sizes: bytes per example.
        unseen: the encoder was trained without any of these readers.
    """
    options = {"seed": seed, "resamples": resamples}
    readers = list(results)

    def worst_difference(baseline: str) -> Interval:
        differences = [
            paired_interval(results[r]["latent"].f1, results[r][baseline].f1, **options)
            for r in readers
        ]
        return min(differences)

    h1 = worst_difference("text")
    positions = min(
        mean(results[r]["text"].positions) / mean(results[r]["latent"].positions) for r in readers
    )
    h2 = min(worst_difference("token_budget"), worst_difference("token_budget_question"))
    h3 = max(
        ratio_interval(
            results[r]["latent"].nll,
            [max(nll, SMALLEST_NLL) for nll in results[r]["text"].nll],
            **options,
        )
        for r in readers
    )
    verdicts = {
        "H1": {
            **_entry(h1, H1_BAR, h1.mean >= H1_BAR and positions >= H1_POSITIONS),
            "position_ratio": positions,
        },
        "H2": _entry(h2, H2_BAR, h2.mean >= H2_BAR),
        "H3": _entry(h3, H3_BAR, h3.mean <= H3_BAR),
        "H4": NOT_MEASURED,
        "H5": _prefill(measured, results),
        "H6": _bytes(results, by_bits, payload_sizes, brotli_sizes, options),
        "H7": _entry(h1, H7_BAR, h1.mean >= H7_BAR) if unseen else NOT_MEASURED,
    }
    if not all(_reads_text(methods) for methods in results.values()):
        return {**verdicts, **dict.fromkeys(("H1", "H3", "H4", "H6", "H7"), NOT_MEASURED)}
    if joint is not None:
        single = max((results[r]["latent"].f1 for r in readers), key=mean)
        h4 = paired_interval(joint.f1, single, **options)
        verdicts["H4"] = _entry(h4, H4_BAR, h4.mean >= H4_BAR)
    return verdicts


def _reads_text(methods: Mapping[str, MethodResult]) -> bool:
    """Whether a reader's text score is above what needs no context or no model."""
    floor = max(mean(methods["closed_book"].f1), mean(methods["first_words"].f1))
    return mean(methods["text"].f1) > floor


def _prefill(measured: Mapping[str, Any], results: Results) -> dict[str, Any]:
    """H5: text prefill time over latent prefill time, and payload bytes below the text's."""
    ratios = []
    for methods in results.values():
        text, latent = methods["text"].prefill_ms, methods["latent"].prefill_ms
        if text is None or latent is None:
            return NOT_MEASURED
        ratios.append(text / latent)
    sizes = measured["bytes"]
    smaller = sizes["payload_mean"][str(measured["latent"]["bits"])] < sizes["text_utf8_mean"]
    worst = min(ratios)
    passed = worst > H5_BAR and smaller
    return _entry(Interval(worst, worst, worst), H5_BAR, passed) | {"low": None, "high": None}


def _bytes(
    results: Results,
    by_bits: Mapping[str, Mapping[int, MethodResult]],
    payload_sizes: Mapping[int, list[int]],
    brotli_sizes: list[int],
    options: dict[str, int],
) -> dict[str, Any]:
    """H6: payload over brotli bytes at the narrowest width that keeps 95% of every reader's text
    F1."""
    kept = [
        bits
        for bits in payload_sizes
        if all(mean(by_bits[r][bits].f1) >= H6_SHARE * mean(results[r]["text"].f1) for r in results)
    ]
    bits = min(kept or payload_sizes)
    ratio = ratio_interval(payload_sizes[bits], brotli_sizes, **options)
    return _entry(ratio, H6_BAR, bool(kept) and ratio.mean < H6_BAR) | {"bits": bits}
