"""The report's part on patterns: readers that work together on one task (docs/patterns.md)."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from latentwire_fast.evaluation.provenance import command
from latentwire_fast.evaluation.report.formatting import cell, number, percent
from latentwire_fast.registry import PATTERNS

logger = logging.getLogger(__name__)
COSTS = {
    "bytes": "Bytes",
    "gflops": "GFLOP",
    "ms": "ms",
    "sender_gflops": "Sender GFLOP",
    "sender_ms": "Sender ms",
}


def stored_patterns(eval_dir: Path) -> list[dict[str, Any]]:
    """The results of the patterns that were run, by file name; what is no result is left out."""
    found = []
    for path in sorted(eval_dir.glob("pattern_*.json")):
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
            is_result = isinstance(results["rows"], list) and isinstance(results["pattern"], str)
        except (OSError, ValueError, LookupError, TypeError):
            is_result = False
        if is_result:
            found.append(results)
        else:
            logger.warning("%s holds no results of a pattern; the report leaves it out", path)
    return found


def patterns_view(patterns: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One table per pattern: a row per method and what it was given."""
    return [_pattern(results) for results in patterns]


def _pattern(results: Mapping[str, Any]) -> dict[str, Any]:
    name, rows = results["pattern"], results["rows"]
    scores = list(dict.fromkeys(score for row in rows for score in row["scores"]))
    fitted = results.get("validation") or 0
    run = results.get("run") or {}
    return {
        "title": PATTERNS[name].title if name in PATTERNS else name.replace("_", " "),
        "questions": results.get("questions") or 0,
        "fitted": f"{number(fitted, digits=0)} others to fit on" if fitted else "",
        "data": _without_folders(str(results.get("data"))),
        "command": run.get("command")
        or command("latentwire_fast.evaluate pattern", run.get("name") or "NAME", name=name),
        "columns": [*(score.replace("_", " ") for score in scores), *COSTS.values()],
        "rows": [
            {
                "given": row["given"].replace("_", " "),
                "method": row["method"],
                "is_ours": row["given"] == "payload",
                "cells": [
                    *(percent(row["scores"].get(score)) for score in scores),
                    *(cell(row.get(cost), digits=_digits(row.get(cost))) for cost in COSTS),
                ],
            }
            for row in rows
        ],
        "differences": list(_differences(results.get("facts") or {})),
    }


def _differences(facts: Mapping[str, Any], *path: str) -> Iterator[dict[str, Any]]:
    """Intervals anywhere among the facts: paired differences of two methods, in points."""
    for key, value in facts.items():
        if not isinstance(value, Mapping):
            continue
        if {"mean", "low", "high"} <= value.keys():
            of = ", ".join(part.replace("_", " ") for part in path)
            yield {"of": of, "label": key, "value": cell(value, scale=100, signed=True)}
        else:
            yield from _differences(value, *path, key)


def _digits(value: float | None) -> int:
    """Decimals that give about three digits."""
    return 0 if not value or value >= 100 else 1 if value >= 10 else 2


def _without_folders(data: str) -> str:
    """A source with its files' names alone: their folders are no matter elsewhere."""
    sources = data.split(",")
    names = ["=".join(part.rpartition("/")[2] for part in source.split("=")) for source in sources]
    return ",".join(names)
