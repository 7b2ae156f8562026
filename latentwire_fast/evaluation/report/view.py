"""The content of a report: the numbers of one evaluation arranged for the templates, as text.

Both templates print the same view, so HTML and Markdown cannot disagree.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from latentwire_fast.evaluation.console import not_frozen
from latentwire_fast.evaluation.fitting import DOES_NOT_FIT, fits_not
from latentwire_fast.evaluation.hypotheses.base import hypotheses
from latentwire_fast.evaluation.methods.base import (
    EvaluationMethod,
    by_kind,
    methods_by_bits,
    sorted_widths,
)
from latentwire_fast.evaluation.report.collapse import collapse_view
from latentwire_fast.evaluation.report.commands import (
    commands,
    evaluate_command,
    train_command,
)
from latentwire_fast.evaluation.report.differences import continuation, difference_rows
from latentwire_fast.evaluation.report.extra_scores import EXTRA_SCORES, Means
from latentwire_fast.evaluation.report.figure_names import figure_note
from latentwire_fast.evaluation.report.formatting import (
    MISSING,
    Cell,
    cell,
    mean,
    number,
    percent,
    ratio,
    size,
)
from latentwire_fast.evaluation.report.hypothesis_rows import hypothesis_row, verdict
from latentwire_fast.evaluation.report.latent_facts import latent_facts
from latentwire_fast.evaluation.report.patterns import patterns_view
from latentwire_fast.evaluation.report.sanity_checks import find_warnings
from latentwire_fast.evaluation.report.sets import sets_view
from latentwire_fast.evaluation.report.shown_examples import choose_examples
from latentwire_fast.evaluation.report.text_bytes import text_bytes

Records = Sequence[Mapping[str, Any]]


def build_view(
    metrics: Mapping[str, Any],
    predictions: Records,
    diagnostics: Records,
    config: Mapping[str, Any],
    *,
    extra: Means,
    patterns: Records = (),
) -> dict[str, Any]:
    """Everything that the templates print, except the figures."""
    run = metrics.get("run") or {}
    return {
        "run": run,
        "examples": metrics.get("examples") or 0,
        "base": config.get("base"),
        "not_frozen": [
            not_frozen(name, entry) for name, entry in (metrics.get("lora") or {}).items()
        ],
        "is_pure": run.get("mode") == "pure",
        "headline": headline(metrics),
        "tiles": list(_tiles(metrics)),
        "warnings": find_warnings(metrics, predictions, diagnostics),
        "hypotheses": [hypothesis_row(metrics, key) for key in hypotheses()],
        "columns": [title for title, *_ in _COLUMNS],
        "readers": [
            {
                "name": name,
                "rows": list(_method_rows(methods, metrics)),
                "differences": list(difference_rows(metrics, name)),
            }
            for name, methods in _readers(metrics).items()
        ],
        "width_columns": _width_columns(metrics),
        "widths": list(_width_rows(metrics)),
        "sets": sets_view(metrics),
        "patterns": patterns_view(patterns),
        "text_bytes": text_bytes(metrics),
        "joint": _joint(metrics),
        "continuation": continuation(metrics),
        "extra_columns": list(EXTRA_SCORES.values()),
        "extra": list(_extra_rows(extra)),
        "collapse": collapse_view(metrics),
        "timed": (config.get("evaluation") or {}).get("timing_examples") or "a few",
        "logged": f"{len(diagnostics):,} logged steps",
        "figure_note": figure_note(list(metrics.get("readers") or {})),
        "validation": _validation(metrics.get("validation") or {}),
        "shown_examples": choose_examples(predictions, metrics),
        "facts": list(_facts(metrics)),
        "commands": commands(run, config),
        "evaluate_command": evaluate_command(run),
        "train_command": train_command(run, config),
        "config": json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False),
        "missing": MISSING,
    }


# --- the head of the page -------------------------------------------------------------------------


def headline(metrics: Mapping[str, Any]) -> str:
    """The result in one sentence."""
    payload, sizes = _payload(metrics), metrics.get("bytes") or {}
    bits = (metrics.get("latent") or {}).get("bits")
    readers = _readers(metrics)
    scores = "; ".join(
        f"{name} answers with F1 {_f1(methods, 'latent')} from it, {_f1(methods, 'text')} from "
        "the text"
        for name, methods in readers.items()
    )
    subject = f"One payload of {size(payload)} bytes" + (f" at {bits} bits" if bits else "")
    frozen = "" if metrics.get("lora") else "frozen "
    receivers = f"1 {frozen}reader" if len(readers) == 1 else f"{len(readers)} {frozen}readers"
    return (
        f"{subject} stands in for {size(sizes.get('text_utf8_mean'))} bytes of text "
        f"({size(sizes.get('text_brotli_mean'))} after brotli) for {receivers}: {scores}."
    )


def _tiles(metrics: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    payload, sizes = _payload(metrics), metrics.get("bytes") or {}
    against = [
        f"{ratio(payload, sizes.get(key))} {label}"
        for key, label in (("text_utf8_mean", "the text"), ("text_brotli_mean", "its brotli form"))
        if sizes.get(key)
    ]
    yield {"value": size(payload), "label": "bytes per payload", "note": ", ".join(against)}
    for name, methods in _readers(metrics).items():
        latent, text = methods.get("latent") or {}, methods.get("text") or {}
        share = _quotient(latent.get("f1"), text.get("f1"))
        fewer = ratio(
            text.get("prefix_positions_mean"), latent.get("prefix_positions_mean"), digits=1
        )
        yield {
            "value": MISSING if share is None else f"{number(100 * share, digits=0)}%",
            "label": f"of {name}'s text F1",
            "note": "" if fewer == MISSING else f"with {fewer} fewer prefix positions",
        }
    verdicts = [verdict(metrics, key) for key in hypotheses()]
    yield {
        "value": f"{verdicts.count('pass')} of {len(verdicts)}",
        "label": "hypotheses pass",
        "note": f"{verdicts.count('fail')} fail, {verdicts.count('not measured')} not measured",
    }


# --- tables ---------------------------------------------------------------------------------------


def _positions(value: Any) -> Cell:
    found = mean(value)
    return cell(value, digits=0 if found is not None and found == round(found) else 1)


_COLUMNS = (
    ("F1", "f1", percent),
    ("EM", "em", percent),
    ("FirstTok@1", "first_token_top1", percent),
    ("FirstTok@5", "first_token_top5", percent),
    ("NLL / token", "nll_per_token", lambda value: cell(value, digits=3)),
    ("Distinct", "diversity", percent),
    ("Positions", "prefix_positions_mean", _positions),
    ("Prefill ms", "prefill_ms_p50", lambda value: cell(value, digits=2)),
    ("End to end ms", "end_to_end_ms_p50", lambda value: cell(value, digits=1)),
)


def _method_rows(
    methods: Mapping[str, Any], metrics: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Registered methods in the order of their kinds, then any other; a method that was not
    measured has empty cells."""
    known, by_bits = by_kind(), methods_by_bits()
    for key in (*known, *(k for k in methods if k not in known and k not in by_bits)):
        if key not in methods:
            continue
        method, reason = known.get(key), (metrics.get("not_measured") or {}).get(key)
        note = method.note if method else ""
        explained = (methods[key] or {}).get("explained_variance")
        if explained is not None:
            note += f"; they hold {percent(explained).text}% of the variance"
        yield {
            "label": method.label if method else key.replace("_", " "),
            "note": note if methods[key] is not None or not fits_not(reason) else DOES_NOT_FIT,
            "kind": method.kind if method else "budget",
            "cells": [show((methods[key] or {}).get(score)) for _, score, show in _COLUMNS],
            "bytes": _bytes_of(method, methods[key] or {}, metrics),
        }


def _bytes_of(
    method: EvaluationMethod | None, entry: Mapping[str, Any], metrics: Mapping[str, Any]
) -> str:
    """Bytes that a method sends in place of the text, where it has a size of its own."""
    if entry.get("payload_mean") is not None:
        return size(entry["payload_mean"])
    sizes, payload = metrics.get("bytes") or {}, size(_payload(metrics))
    sends = method.sends if method else "nothing"
    if sends == "text":
        utf8, brotli = size(sizes.get("text_utf8_mean")), size(sizes.get("text_brotli_mean"))
        return f"{utf8}, brotli {brotli}"
    if sends == "payload":
        return payload
    if sends == "both":
        return size(entry.get("sent_bytes_mean"))
    return f"≤ {payload}" if sends == "at most payload" and payload != MISSING else MISSING


def _width_columns(metrics: Mapping[str, Any]) -> list[str]:
    """Headings of the scores at every bit width: those of each reader in turn."""
    return [
        heading.format(reader=name)
        for name in _readers(metrics)
        for method in methods_by_bits().values()
        if method.by_bits
        for _, heading in method.by_bits.columns
    ]


def _measured_widths(metrics: Mapping[str, Any]) -> list[str]:
    """The bit widths that payloads or scores are of."""
    found = set((metrics.get("bytes") or {}).get("payload_mean") or {})
    for methods in _readers(metrics).values():
        for key in methods_by_bits():
            found |= set(methods.get(key) or {})
    return sorted_widths(found)


def _width_rows(metrics: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    sizes = metrics.get("bytes") or {}
    for bits in _measured_widths(metrics):
        scores = [
            ((methods.get(key) or {}).get(bits) or {}).get(score)
            for methods in _readers(metrics).values()
            for key, method in methods_by_bits().items()
            if method.by_bits
            for score, _ in method.by_bits.columns
        ]
        payload = (sizes.get("payload_mean") or {}).get(bits)
        if payload is None and all(score is None for score in scores):
            continue
        yield {
            "bits": bits,
            "is_run": bits == str((metrics.get("latent") or {}).get("bits")),
            "payload": size(payload),
            "of_utf8": ratio(payload, sizes.get("text_utf8_mean")),
            "of_brotli": ratio(payload, sizes.get("text_brotli_mean")),
            "scores": [percent(score) for score in scores],
        }


def _joint(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    joint = metrics.get("joint") or {}
    rows = (
        ("Joint rescoring", "f1", "F1 of the candidate that the readers together find most likely"),
        ("Best single reader", "best_single_f1", "F1 of the better reader's own answers"),
        ("Oracle", "oracle_f1", "F1 when the better answer of each example is known"),
        ("Agreement", "agreement", "of the examples are answered alike"),
    )
    return [
        {"label": label, "note": note, "value": percent(joint.get(key))}
        for label, key, note in rows
        if joint.get(key) is not None
    ]


def _validation(found: Mapping[str, Any]) -> dict[str, Any] | None:
    """The scores of the last and of the best validation; None where there were none."""
    if not found:
        return None
    rows = []
    for which in ("last", "best"):
        cells = []
        for scores in found[which]["scores"].values():
            cells += [number(scores["nll"], digits=3), percent(scores["f1"]).text]
        note = " (this report's model)" if found["model"] == which else ""
        rows.append({"label": which + note, "step": str(found[which]["step"]), "cells": cells})
    metric = "NLL" if found["metric"] == "nll" else "F1"
    note = (
        f"On {found['examples']} examples that are neither trained on nor evaluated on. Best is "
        f"the step with the best running mean of the {metric}, of which "
        f"{number(100 * found['ema'], digits=0)}% stays at each validation."
    )
    if found["stopped_early"]:
        note += " Training ended early: the last validations were not the best."
    names = found["last"]["scores"]
    return {
        "columns": [f"{name} {score}" for name in names for score in ("NLL / token", "F1")],
        "rows": rows,
        "note": note,
        "examples": found["examples"],
    }


def _extra_rows(extra: Means) -> Iterator[dict[str, Any]]:
    for name, methods in extra.items():
        for key, method in by_kind().items():
            if key in methods:
                yield {
                    "reader": name,
                    "label": method.label,
                    "cells": [percent(methods[key].get(score)) for score in EXTRA_SCORES],
                }


# --- the foot of the page -------------------------------------------------------------------------


def _facts(metrics: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    run = metrics.get("run") or {}
    for label, key in (("Run", "name"), ("Preset", "preset"), ("Mode", "mode"), ("Seed", "seed")):
        if run.get(key) is not None:
            yield label, str(run[key])
    yield from latent_facts(metrics)
    yield "Examples", number(metrics.get("examples") or 0, digits=0)
    if run.get("wall_seconds") is not None:
        yield "Time", f"{number(run['wall_seconds'] / 60)} minutes"
    for label, key in (
        ("Device", "device"),
        ("Commit", "commit"),
        ("Configuration", "config_sha256"),
    ):
        if run.get(key):
            yield label, str(run[key])
    versions = sorted((run.get("versions") or {}).items())
    if versions:
        yield "Versions", ", ".join(f"{name} {version}" for name, version in versions)


# --- shorthands -----------------------------------------------------------------------------------


def _readers(metrics: Mapping[str, Any]) -> Mapping[str, Any]:
    return metrics.get("readers") or {}


def _payload(metrics: Mapping[str, Any]) -> float | None:
    """Mean payload bytes at the run's bits."""
    bits = str((metrics.get("latent") or {}).get("bits"))
    return ((metrics.get("bytes") or {}).get("payload_mean") or {}).get(bits)


def _f1(methods: Mapping[str, Any], method: str) -> str:
    return percent((methods.get(method) or {}).get("f1")).text


def _quotient(top: Any, bottom: Any) -> float | None:
    upper, lower = mean(top), mean(bottom)
    return None if upper is None or not lower else upper / lower
