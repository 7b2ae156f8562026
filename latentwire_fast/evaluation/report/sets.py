"""The report's tables of the sets of a mixture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from latentwire_fast.evaluation.methods.base import by_kind
from latentwire_fast.evaluation.report.formatting import percent
from latentwire_fast.evaluation.set_scores import METRIC_NAMES


def sets_view(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One table per set: a row per method, a column per reader, in the set's own score."""
    return [
        {
            "name": name,
            "examples": entry["examples"],
            "metric": METRIC_NAMES.get(entry["metric"], entry["metric"]),
            "readers": list(entry["readers"]),
            "rows": list(_rows(entry)),
        }
        for name, entry in (metrics.get("sets") or {}).items()
    ]


def _rows(entry: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for key, method in by_kind().items():
        found = [methods.get(key) for methods in entry["readers"].values()]
        if any(found):
            yield {
                "label": method.label,
                "kind": method.kind,
                "cells": [percent((scores or {}).get(entry["metric"])) for scores in found],
            }
