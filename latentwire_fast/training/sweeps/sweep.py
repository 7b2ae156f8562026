"""A sweep in its folder: what is finished, what is left, its tables and its figure."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from latentwire_fast.config.sweep import PlannedRun, Sweep, planned_runs, read_sweep
from latentwire_fast.errors import ConfigError, RunStopped
from latentwire_fast.evaluation.report.formatting import MISSING
from latentwire_fast.evaluation.report.sweep_figure import sweep_figure
from latentwire_fast.evaluation.sweep_scores import ExampleScores, run_scores
from latentwire_fast.evaluation.sweep_table import FinishedRun, sweep_table, table_lines
from latentwire_fast.files.atomic import write_atomically
from latentwire_fast.files.lock import RunLock
from latentwire_fast.files.run_folder import RunFolder
from latentwire_fast.files.sweep_folder import SweepFolder
from latentwire_fast.training.builders import absolute_paths, check_stored_config
from latentwire_fast.training.sweeps.forecast import Cost, costs, measured_cost
from latentwire_fast.training.sweeps.history import append_outcome, wall_seconds
from latentwire_fast.training.sweeps.processes import Environment, Outcome, Processes, places

logger = logging.getLogger(__name__)


class SweepRun:
    """A sweep in its folder.

    Args:
        sweep: what is trained.
        out: the folder; made if missing. Finished runs in it are kept, others go on.
        imports: modules that hold parts from outside the package.
        only: these variants; none named: all.

    Raises:
        ConfigError: a variant is no configuration that can be trained, `only` names none, or the
            folder cannot be a sweep's.
    """

    def __init__(
        self, sweep: Sweep, out: Path, *, imports: Sequence[str] = (), only: Sequence[str] = ()
    ) -> None:
        unknown = [name for name in only if name not in sweep.variants]
        if unknown:
            raise ConfigError(
                f"--only {unknown[0]}: no such variant; there are {', '.join(sweep.variants)}"
            )
        if RunFolder(out).config.exists() or (out.exists() and not out.is_dir()):
            raise ConfigError(f"{out} is a run, or no folder; give another --out")
        self.sweep = sweep
        self.folder = SweepFolder(out)
        self.runs = planned_runs(sweep, imports=imports)
        self.only = tuple(only) or tuple(sweep.variants)

    def is_finished(self, run: PlannedRun) -> bool:
        """Whether a run is trained and scored.

        Raises:
            ConfigError: its folder holds a run with another configuration.
        """
        folder = self.folder.run(run.name)
        check_stored_config(folder.config, absolute_paths(run.config))
        return folder.metrics.exists()

    def finished(self) -> list[FinishedRun]:
        """What all finished runs scored; a run of another configuration is left out."""
        seconds = wall_seconds(self.folder)
        found = []
        for run in self.runs:
            try:
                if not self.is_finished(run):
                    continue
            except ConfigError as error:
                logger.warning("%s", error)
                continue
            folder = self.folder.run(run.name)
            found.append(
                FinishedRun(
                    run.variant,
                    run.seed,
                    run_scores(folder),
                    ExampleScores.read(folder),
                    seconds.get((run.variant, run.seed)),
                )
            )
        return found

    def left(self) -> list[PlannedRun]:
        """What is not finished, in the order in which it is trained.

        Raises:
            ConfigError: as `is_finished`.
        """
        return [run for run in self.runs if run.variant in self.only and not self.is_finished(run)]

    def train(self, places: Sequence[Environment]) -> list[Outcome]:
        """Train what is left, as many at a time as there are places; then write the tables.

        Returns:
            The runs that failed.

        Raises:
            RunStopped: by SIGINT or SIGTERM; every run has saved itself.
            TrainingError: another process runs this sweep.
        """
        with RunLock(self.folder.path):
            left = self.left()
            done = 0

            def on_end(outcome: Outcome) -> None:
                nonlocal done
                done += 1
                self._note(outcome, done, len(left))

            processes = Processes(self.folder, places, on_start=self._lend, on_end=on_end)
            outcomes = processes.run(left)
            self.write_tables()
            if all(self.folder.run(run.name).metrics.exists() for run in self.runs):
                shutil.rmtree(self.folder.frozen_work, ignore_errors=True)
        if processes.signal is not None:
            raise RunStopped(
                f"stopped by a signal with {len(self.left())} runs left; everything is saved. Run "
                "the same command to go on",
                status=128 + processes.signal,
            )
        return [outcome for outcome in outcomes if outcome.status == "failed"]

    def _lend(self, run: PlannedRun) -> None:
        """Give a run that begins a copy of what frozen models computed for the first run, or for
        one that it starts from. It is found by the model's weights and the text: what this run
        needs is used, and the rest is left."""
        own = self.folder.run(run.name).frozen_work
        starts = [RunFolder(Path(path)).frozen_work for path in run.config.warm_start.values()]
        lent = next((p for p in (self.folder.frozen_work, *starts) if p.exists()), None)
        if lent is None or own.exists():
            return
        size = sum(path.stat().st_size for path in lent.iterdir())
        if size < shutil.disk_usage(lent).free / 2:
            shutil.copytree(lent, own)

    def _drop(self, folder: RunFolder) -> None:
        """Drop what only a resume of a finished run needs, many times the size of the model; what
        frozen models computed for the first one is kept, to be lent."""
        shutil.rmtree(folder.checkpoints, ignore_errors=True)
        if folder.frozen_work.exists() and not self.folder.frozen_work.exists():
            folder.frozen_work.rename(self.folder.frozen_work)
        shutil.rmtree(folder.frozen_work, ignore_errors=True)

    def _note(self, outcome: Outcome, done: int, total: int) -> None:
        """Add an outcome to the history, and say it."""
        folder = self.folder.run(outcome.run.name)
        finished = outcome.status == "finished" and folder.metrics.exists()
        if outcome.seconds:
            append_outcome(self.folder, outcome, run_scores(folder) if finished else None)
        if finished:
            self._drop(folder)
        words = f" ({outcome.error})" if outcome.error else ""
        logger.info(
            "%s %s after %.1f minutes, %d of %d%s",
            outcome.run.name,
            outcome.status,
            outcome.seconds / 60,
            done,
            total,
            words,
        )

    def write_tables(self) -> None:
        """Write the tables and the figure of what is finished."""
        table = sweep_table(
            self.finished(),
            base=self.sweep.compared_to,
            variants=list(self.sweep.variants),
            seeds=self.sweep.seeds,
        )
        self.folder.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder.table, json.dumps(table, indent=2) + "\n")
        write_atomically(self.folder.table_text, "\n".join(table_lines(table)) + "\n")
        figure = sweep_figure(table)
        if figure is not None:
            write_atomically(self.folder.figure, figure)

    def forecast_lines(self, places: Sequence[Environment]) -> list[str]:
        """What is to be trained and how long it takes, for the terminal. Where nothing is finished,
        a few steps of the base are trained and scored, in a folder of their own.

        Raises:
            TrainingError: those steps failed.
        """
        left = {run.name for run in self.left()}
        known = costs(self.finished())
        if left and not known:
            base = next(r for r in self.runs if r.variant == self.sweep.compared_to)
            known[""] = measured_cost(base, {**os.environ, **places[0]})
        lines = [f"{'run':40} {'steps':>7} {'minutes':>8}"]
        seconds = 0.0
        for run in (run for run in self.runs if run.variant in self.only):
            steps = str(run.config.total_steps or MISSING)
            if run.name not in left:
                lines.append(f"{run.name:40} {steps:>7} {'finished':>8}")
                continue
            cost = (known.get(run.variant) or known[""]).of(run.config)
            seconds += cost
            lines.append(f"{run.name:40} {steps:>7} {cost / 60:8.1f}")
        return [*lines, *self._total(len(left), seconds, len(places), known)]

    def _total(self, left: int, seconds: float, jobs: int, known: dict[str, Cost]) -> list[str]:
        lines = [f"{len(self.sweep.variants)} variants, {left} runs to train, {jobs} at a time"]
        if left:
            hours = seconds / 3600
            lines.append(
                f"{hours:.1f} hours of processes, about {hours / min(jobs, left):.1f} by the clock "
                f"(predicted from {known[''].source})"
            )
        return lines


def open_sweep(
    file: Path,
    out: Path | None = None,
    *,
    imports: Sequence[str] = (),
    seeds: Sequence[int] = (),
    only: Sequence[str] = (),
) -> SweepRun:
    """The sweep of a file, in its folder.

    Args:
        out: the folder; `runs/` and the file's name without .json, unless given.
        seeds: in the place of the file's.

    Raises:
        ConfigError: not a sweep, or as `SweepRun`.
    """
    sweep = read_sweep(file)
    if seeds:
        sweep = replace(sweep, seeds=tuple(seeds))
    return SweepRun(sweep, out or Path("runs") / file.stem, imports=imports, only=only)


def places_here(jobs: int | None) -> list[Environment]:
    """The places of this machine, for so many runs at a time.

    Raises:
        ConfigError: fewer than one.
    """
    if jobs is not None and jobs < 1:
        raise ConfigError(f"--jobs {jobs}: expected at least 1")
    gpus = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    return places(jobs, gpus=gpus)
