"""The table of a sweep: every variant's scores over its seeds, and its difference to the base.

Two kinds of uncertainty are kept apart. An interval says what other examples would change: it is a
bootstrap over the held-out examples of the mean over the seeds. A spread says what another training
would change: it is the standard deviation over the seeds, and needs two of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from latentwire_fast.evaluation.metrics import Interval, mean_interval, ratio_interval
from latentwire_fast.evaluation.report.formatting import MISSING, number
from latentwire_fast.evaluation.sweep_scores import ExampleScores

SEED = 0  # of the bootstrap
PLAIN = ("effective_rank", "pairwise_cosine", "bytes", "steps", "steps_per_second")


@dataclass(frozen=True)
class FinishedRun:
    """A finished run of a sweep.

    Attributes:
        scores: of `run_scores`.
        examples: the scores of every held-out example.
        seconds: from the start of its process to the end, loading and evaluation included, where
            that was noted.
    """

    variant: str
    seed: int
    scores: Mapping[str, Any]
    examples: ExampleScores
    seconds: float | None = None


def sweep_table(
    runs: Sequence[FinishedRun], *, base: str, variants: Sequence[str], seeds: Sequence[int]
) -> dict[str, Any]:
    """The table as JSON: by variant, in the order of the sweep; None where nothing is finished.

    Args:
        base: the variant that the others are compared to, run by run of one seed.
    """
    by_variant = {v: [run for run in runs if run.variant == v] for v in variants}
    bases = {run.seed: run for run in by_variant[base]}
    return {
        "base": base,
        "seeds": list(seeds),
        "readers": list(dict.fromkeys(name for run in runs for name in run.scores["readers"])),
        "variants": {
            variant: _variant(found, {} if variant == base else bases) if found else None
            for variant, found in by_variant.items()
        },
    }


def _variant(runs: Sequence[FinishedRun], bases: Mapping[int, FinishedRun]) -> dict[str, Any]:
    first = runs[0].scores
    pairs = [(run, bases[run.seed]) for run in runs if run.seed in bases]
    seconds = [run.seconds for run in runs if run.seconds is not None]
    return {
        "seeds": [run.seed for run in runs],
        "readers": {name: _reader(name, runs, pairs) for name in first["readers"]},
        **{name: _over_seeds([run.scores[name] for run in runs]) for name in PLAIN},
        "bytes_by_bits": {
            bits: mean([run.scores["bytes_by_bits"][bits] for run in runs])
            for bits in first["bytes_by_bits"]
        },
        "bottleneck": first["bottleneck"],
        "text_bytes": first["text_bytes"],
        "latent": first["latent"],
        "mode": first["mode"],
        "wall_seconds": mean(seconds) if seconds else None,
    }


def _reader(
    name: str, runs: Sequence[FinishedRun], pairs: Sequence[tuple[FinishedRun, FinishedRun]]
) -> dict[str, Any]:
    entries = [run.scores["readers"][name] for run in runs]
    own = [run.examples.f1[name] for run in runs]
    both = [
        (run.examples, base.examples)
        for run, base in pairs
        if name in base.examples.f1 and run.examples.contexts == base.examples.contexts
    ]
    differences = [
        {key: f1 - base.f1[name][key] for key, f1 in run.f1[name].items()} for run, base in both
    ]
    return {
        "f1": _resampled(own, runs[0].examples.contexts),
        "text_f1": _over_seeds([entry["text_f1"] for entry in entries]),
        "nll": _over_seeds([entry["nll"] for entry in entries]),
        **{
            key: {
                bits: _over_seeds([entry[key].get(bits) for entry in entries])
                for bits in entries[0][key]
            }
            for key in ("f1_by_bits", "cut_text_f1_by_bits")
        },
        "coded_bytes": entries[0]["coded_bytes"],
        "minus_base": _resampled(differences, runs[0].examples.contexts),
        "nll_minus_base": _nll_difference(name, both),
    }


def _nll_difference(
    name: str, pairs: Sequence[tuple[ExampleScores, ExampleScores]]
) -> dict[str, Any] | None:
    """By how much the NLL per token is above the base's, as `_resampled`."""
    found = [(run.nll.get(name, {}), base.nll.get(name, {})) for run, base in pairs]
    keys = list(found[0][0]) if found else []
    if not keys or any(scores.keys() != set(keys) for pair in found for scores in pair):
        return None
    tokens = [found[0][0][key][1] for key in keys]
    rises = [[ours[key][0] - theirs[key][0] for key in keys] for ours, theirs in found]
    interval = ratio_interval(
        [mean(of_seeds) for of_seeds in zip(*rises, strict=True)],
        tokens,
        seed=SEED,
        clusters=[pairs[0][0].contexts[key] for key in keys],
    )
    over = _over_seeds([sum(rise) / sum(tokens) for rise in rises]) or {}
    return {**over, "low": interval.low, "high": interval.high}


def _over_seeds(values: Sequence[float | None]) -> dict[str, Any] | None:
    """Mean and standard deviation over the seeds, and the numbers themselves."""
    found = [value for value in values if value is not None]
    if not found:
        return None
    return {
        "mean": mean(found),
        "sd": stdev(found) if len(found) > 1 else None,
        "by_seed": found,
    }


def _resampled(
    scores: Sequence[Mapping[str, float]], contexts: Mapping[str, str]
) -> dict[str, Any] | None:
    """The same with the interval over examples; None for no seeds, or other examples each time."""
    if not scores or any(s.keys() != scores[0].keys() for s in scores):
        return None
    keys = list(scores[0])
    means = [mean(s[key] for s in scores) for key in keys]
    interval: Interval = mean_interval(means, seed=SEED, clusters=[contexts[key] for key in keys])
    over = _over_seeds([mean(s.values()) for s in scores]) or {}
    return {**over, "low": interval.low, "high": interval.high}


def table_lines(table: Mapping[str, Any]) -> list[str]:
    """The table as Markdown, F1 and its differences in points; below it what is not finished."""
    readers: Sequence[str] = table["readers"]
    heads = ["variant", "seeds"]
    heads += [f"{name} F1" for name in readers]
    heads += [f"{name} minus {table['base']}" for name in readers]
    heads += [f"{name} NLL" for name in readers]
    heads += [f"{name} NLL minus {table['base']}" for name in readers]
    heads += ["effective rank", "bytes", "steps/s"]
    finished = {name: found for name, found in table["variants"].items() if found is not None}
    missing = [name for name in table["variants"] if name not in finished]
    return [
        _line(heads),
        _line(["---", *["---:"] * (len(heads) - 1)]),
        *(_line(_row(name, found, readers)) for name, found in finished.items()),
        "",
        *([f"Not finished, with any seed: {', '.join(missing)}.", ""] if missing else []),
        "F1 in points of 100: the mean over the seeds, ± the standard deviation over the seeds, "
        "and in brackets the 95% interval over the held-out examples. Differences are paired by "
        "seed and by example. NLL is per token, steps/s of the training alone.",
        *_wall_time(list(finished.values())),
    ]


def _wall_time(finished: Sequence[Mapping[str, Any]]) -> list[str]:
    """How long the runs took, where that was noted."""
    timed = [found for found in finished if found["wall_seconds"] is not None]
    hours = sum(found["wall_seconds"] * len(found["seeds"]) for found in timed) / 3600
    runs = sum(len(found["seeds"]) for found in timed)
    return (
        ["", f"{runs} runs took {number(hours)} hours in all, evaluations included."]
        if runs
        else []
    )


def _row(name: str, found: Mapping[str, Any], readers: Sequence[str]) -> list[str]:
    entries = [found["readers"].get(reader) or {} for reader in readers]
    return [
        name,
        " ".join(str(seed) for seed in found["seeds"]),
        *(_points(entry.get("f1")) for entry in entries),
        *(_points(entry.get("minus_base"), signed=True) for entry in entries),
        *(_number(entry.get("nll"), 3) for entry in entries),
        *(_spread(entry.get("nll_minus_base"), digits=3) for entry in entries),
        _number(found["effective_rank"], 1),
        _number(found["bytes"], 0),
        _number(found["steps_per_second"], 2),
    ]


def _points(value: Mapping[str, Any] | None, *, signed: bool = False) -> str:
    """A share in points, with its spread and its interval."""
    return _spread(value, scale=100, signed=signed)


def _spread(
    value: Mapping[str, Any] | None, *, scale: float = 1, digits: int = 1, signed: bool = True
) -> str:
    """A mean over seeds, with its spread and its interval."""
    if value is None:
        return MISSING

    def text(score: float, *, signed: bool = signed) -> str:
        return number(scale * score, digits=digits, signed=signed)

    spread = "" if value["sd"] is None else f" ± {text(value['sd'], signed=False)}"
    return f"{text(value['mean'])}{spread} ({text(value['low'])} to {text(value['high'])})"


def _number(value: Mapping[str, Any] | None, digits: int) -> str:
    return MISSING if value is None else number(value["mean"], digits=digits)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
