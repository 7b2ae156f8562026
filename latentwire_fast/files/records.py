"""The records of a run's log, read back: `diagnostics.jsonl`."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a diagnostics file, if there is one; a torn line (a kill while writing) and
    what is no record are dropped."""
    records: list[dict[str, Any]] = []
    torn = 0
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if _is_record(record):
            records.append(record)
        else:
            torn += 1
    if torn:
        logger.warning("dropped %d unreadable lines of %s", torn, path)
    return records


def _is_record(value: Any) -> bool:
    """Whether a line's value has what is read of records, as the numbers that they are."""

    def are_numbers(values: Iterable[Any]) -> bool:
        return all(isinstance(v, int | float) for v in values)

    if not (isinstance(value, dict) and are_numbers(value.get(k) for k in ("step", "seconds"))):
        return False
    parts = [value.get(key) or {} for key in ("losses", "accuracy", "latent")]
    return all(
        isinstance(part, dict) and are_numbers(v for v in part.values() if v is not None)
        for part in [*parts, {"loss": value.get("loss")}]
    )
