"""What the processes of a sweep did: its `metrics_history.jsonl`."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from latentwire_fast.files.sweep_folder import SweepFolder
from latentwire_fast.training.sweeps.processes import Outcome


def append_outcome(folder: SweepFolder, outcome: Outcome, scores: Mapping[str, Any] | None) -> None:
    """Add how a process ended, with the scores of a finished run."""
    record = {
        "variant": outcome.run.variant,
        "seed": outcome.run.seed,
        "status": outcome.status,
        "seconds": round(outcome.seconds, 3),
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if outcome.error:
        record["error"] = outcome.error
    if scores is not None:
        record["scores"] = dict(scores)
    with folder.history.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def wall_seconds(folder: SweepFolder) -> dict[tuple[str, int], float]:
    """By variant and seed, the seconds of all processes of the run together."""
    seconds: dict[tuple[str, int], float] = {}
    if not folder.history.exists():
        return seconds
    for line in folder.history.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
            key = (str(record["variant"]), int(record["seed"]))
            seconds[key] = seconds.get(key, 0.0) + float(record["seconds"])
        except (ValueError, KeyError, TypeError):  # a line that a kill cut short
            continue
    return seconds
