"""Trainings as processes, several at a time: each is `python -m latentwire_fast.train`."""

from __future__ import annotations

import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from latentwire_fast.config.sweep import PlannedRun
from latentwire_fast.files.sweep_folder import SweepFolder

logger = logging.getLogger(__name__)

Environment = Mapping[str, str]
VISIBLE = "CUDA_VISIBLE_DEVICES"
TAIL = 2000  # bytes of a log in which its last line is looked for


@dataclass(frozen=True)
class Outcome:
    """How the process of a run ended.

    Attributes:
        status: `finished`, `failed`, or `stopped` by a signal to the sweep; a stopped run goes on
            where it was.
        seconds: that the process took.
        error: the last line of its log, where it failed.
    """

    run: PlannedRun
    status: str
    seconds: float = 0.0
    error: str = ""


def places(jobs: int | None, *, gpus: int) -> list[Environment]:
    """For each run that goes on at a time, what its environment has besides: its GPU, or its share
    of the cores.

    Args:
        jobs: how many runs at a time; None: one for each GPU, or else for each core.
        gpus: how many there are. With more jobs than GPUs, some share one.
    """
    if gpus:
        listed = [name for name in os.environ.get(VISIBLE, "").split(",") if name]
        names = listed or [str(number) for number in range(gpus)]
        return [{VISIBLE: names[i % len(names)]} for i in range(jobs or len(names))]
    cores = len(os.sched_getaffinity(0))
    count = jobs or cores
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // count))
    return [{"OMP_NUM_THREADS": threads}] * count


class Processes:
    """Runs trainings as processes; a signal to this one stops them all, saved.

    Args:
        folder: of the sweep.
        places: one for each run that may go on at a time.
        on_start: called with a run before its process starts, in that run's thread.
        on_end: called in the main thread with each outcome.
    """

    def __init__(
        self,
        folder: SweepFolder,
        places: Sequence[Environment],
        *,
        on_start: Callable[[PlannedRun], None],
        on_end: Callable[[Outcome], None],
    ) -> None:
        self.folder = folder
        self.on_start = on_start
        self.on_end = on_end
        self.signal: int | None = None  # that came first
        self._free: queue.SimpleQueue[Environment] = queue.SimpleQueue()
        for place in places:
            self._free.put(place)
        self._count = len(places)
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.RLock()  # the signal handler may interrupt who holds it

    def run(self, runs: Sequence[PlannedRun]) -> list[Outcome]:
        """Train all of them, in this order; one that fails does not stop the others."""
        before = {n: signal.signal(n, self._stop) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            with ThreadPoolExecutor(self._count) as pool:
                futures = [pool.submit(self._one, run) for run in runs]
                outcomes = []
                for future in as_completed(futures):
                    outcomes.append(future.result())
                    self.on_end(outcomes[-1])
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return outcomes

    def _stop(self, number: int, frame: FrameType | None) -> None:
        """Ask every training to save and stop; asked again, end them at once."""
        again, self.signal = self.signal is not None, self.signal or number
        with self._lock:
            for process in self._running:
                process.send_signal(signal.SIGKILL if again else signal.SIGTERM)
        words = "ending" if again else "stopping (saved; once more to end them at once)"
        logger.info("%s %d runs", words, len(self._running))

    def _is_stopped(self) -> bool:
        return self.signal is not None

    def _one(self, run: PlannedRun) -> Outcome:
        place = self._free.get()
        try:
            return self._train(run, place)
        finally:
            self._free.put(place)

    def _train(self, run: PlannedRun, place: Environment) -> Outcome:
        start = time.perf_counter()
        log = self.folder.log(run.name)
        log.parent.mkdir(parents=True, exist_ok=True)
        self.on_start(run)
        with log.open("ab") as output:
            with self._lock:
                if self._is_stopped():
                    return Outcome(run, "stopped")
                process = subprocess.Popen(
                    train_command(run, self.folder.run(run.name).path),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **place},
                    start_new_session=True,  # Ctrl-C comes to this process alone, and is passed on
                )
                self._running.add(process)
            try:
                status = process.wait()
            finally:
                with self._lock:
                    self._running.discard(process)
        seconds = time.perf_counter() - start
        if status == 0:
            return Outcome(run, "finished", seconds)
        if self._is_stopped():
            return Outcome(run, "stopped", seconds)
        return Outcome(run, "failed", seconds, _last_line(log) or f"exit status {status}")


def train_command(run: PlannedRun, folder: Path) -> list[str]:
    """The command that trains a run."""
    module = [sys.executable, "-m", "latentwire_fast.train"]
    return [*module, *run.arguments, "--run", str(folder)]


def _last_line(log: Path) -> str:
    """The last line of a log; of a line that was written over, as progress bars are, its end."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL))
        lines = file.read().decode("utf-8", "replace").replace("\r", "\n").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
