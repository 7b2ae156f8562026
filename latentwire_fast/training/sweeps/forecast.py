"""How long a sweep will take: from its finished runs, or else from a few steps of its base."""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

from latentwire_fast.config.schema import RunConfig
from latentwire_fast.config.serialization import to_json
from latentwire_fast.config.sweep import PlannedRun
from latentwire_fast.errors import TrainingError
from latentwire_fast.evaluation.sweep_table import FinishedRun
from latentwire_fast.files.records import read_records
from latentwire_fast.files.run_folder import RunFolder
from latentwire_fast.training.sweeps.processes import train_command

STEPS = 3  # of each stage that is measured; the first one of a stage is not counted


@dataclass(frozen=True)
class Cost:
    """What runs cost.

    Attributes:
        step: seconds of a step.
        rest: seconds of a run besides: loading, what frozen models compute beforehand, scoring.
        source: where this is known from.
    """

    step: float
    rest: float
    source: str

    def of(self, config: RunConfig) -> float:
        """Seconds of a run of that configuration; stages in epochs are not counted."""
        return self.rest + self.step * config.total_steps


def costs(finished: Sequence[FinishedRun]) -> dict[str, Cost]:
    """By variant what its finished runs cost; under "" the mean of them all."""
    found: dict[str, list[Cost]] = {}
    for run in finished:
        seconds, trained = run.seconds, run.scores["train_seconds"]
        if seconds is None or trained is None:
            continue
        cost = Cost(trained / run.scores["steps"], max(0.0, seconds - trained), "")
        for key in (run.variant, ""):
            found.setdefault(key, []).append(cost)
    return {
        key: Cost(mean(c.step for c in these), mean(c.rest for c in these), _words(key, len(these)))
        for key, these in found.items()
    }


def _words(variant: str, count: int) -> str:
    runs = f"{count} finished run{'s' if count > 1 else ''}"
    return f"{runs} of it" if variant else f"the mean of {runs}"


def measured_cost(run: PlannedRun, environment: Mapping[str, str]) -> Cost:
    """What a few steps of every stage of a run cost, and its evaluation, in a folder that is
    removed again.

    Raises:
        TrainingError: it could not be trained.
    """
    config = replace(
        run.config,
        stages=tuple(
            replace(stage, steps=min(STEPS, stage.steps) or STEPS, epochs=None)
            for stage in run.config.stages
        ),
        log_every=1,
    )
    with tempfile.TemporaryDirectory(prefix="latentwire-sweep-") as place:
        folder = RunFolder(Path(place) / "run")
        settings = Path(place) / "config.json"
        settings.write_text(json.dumps(to_json(config)), encoding="utf-8")
        short = replace(run, arguments=(str(settings), *run.imports), config=config)
        start = time.perf_counter()
        done = subprocess.run(
            train_command(short, folder.path),
            capture_output=True,
            text=True,
            check=False,
            env=dict(environment),
        )
        seconds = time.perf_counter() - start
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or ["nothing was printed"]
            raise TrainingError(f"{run.variant}: its first steps failed: {last[0]}")
        records = read_records(folder.diagnostics)
    step, trained = _pace(records, run.config), records[-1]["seconds"]
    source = f"{STEPS} steps of each stage of {run.variant}"
    return Cost(step, max(0.0, seconds - trained), source)


def _pace(records: Sequence[Mapping[str, Any]], config: RunConfig) -> float:
    """Seconds of a step in the mean over the stages, by their steps; the first step of a stage
    prepares it, and counts only where there is no other."""
    paces: dict[str, list[float]] = {}
    for before, after in pairwise(records):
        if before["stage"] == after["stage"]:
            paces.setdefault(after["stage"], []).append(after["seconds"] - before["seconds"])
    usual = records[-1]["seconds"] / len(records)
    of_stages = [
        (s.steps, mean(paces[s.name]) if s.name in paces else usual) for s in config.stages
    ]
    total = sum(steps for steps, _ in of_stages)
    return sum(steps * pace for steps, pace in of_stages) / total if total else usual
