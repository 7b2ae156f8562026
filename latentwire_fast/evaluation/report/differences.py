"""Tables of differences in a report: the latent against every other method, and running text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from latentwire_fast.evaluation.continuation import WAYS
from latentwire_fast.evaluation.methods.base import by_kind
from latentwire_fast.evaluation.report.formatting import cell, size


def difference_rows(metrics: Mapping[str, Any], reader: str) -> Iterator[dict[str, Any]]:
    """The latent minus each method that was measured, in the methods' order."""
    found = (metrics.get("latent_minus") or {}).get(reader) or {}
    for key, method in by_kind().items():
        if key in found:
            nll, f1 = found[key].get("nll_per_token"), found[key].get("f1")
            yield {
                "label": method.label,
                "cells": [
                    cell(nll, digits=3, signed=True),
                    cell(f1, digits=1, scale=100, signed=True),
                ],
            }


def continuation(metrics: Mapping[str, Any]) -> dict[str, Any] | None:
    """The part on running text; None where it was not measured."""
    found = metrics.get("continuation")
    if not found:
        return None
    return {
        "examples": found.get("examples"),
        "source": str(found.get("source")).rpartition("/")[2],  # its folder is no matter here
        "payload": size(found.get("payload_mean")),
        "utf8": size(found.get("text_utf8_mean")),
        "readers": [
            {"name": name, "rows": list(_ways(entry))}
            for name, entry in (found.get("readers") or {}).items()
        ],
    }


def _ways(entry: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    nll, minus = entry.get("nll_per_token") or {}, entry.get("latent_minus") or {}
    for way, label in WAYS.items():
        yield {
            "label": label,
            "is_ours": way == "latent",
            "cells": [cell(nll.get(way), digits=3), cell(minus.get(way), digits=3, signed=True)],
        }
