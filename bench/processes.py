"""Sections of a run on a GPU: processes with a time limit each, for which the checkout imports."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OK, FAILED = "done", "failed"


def environment() -> dict[str, str]:
    """The environment of the sections: the checkout is importable, nothing is fetched."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        # The profiler, started again where CUDA graphs were replayed, may crash.
        "TEARDOWN_CUPTI": "0",
    }


def start(command: Sequence[str | Path], log: Path | None = None) -> subprocess.Popen[bytes]:
    """A section's process, leader of a group of its own; its output goes to `log` or to ours."""
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(log.open("wb")) if log else None
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(),
            stdout=output,
            stderr=subprocess.STDOUT if log else None,
            start_new_session=True,
        )


def finish(process: subprocess.Popen[bytes], *, by: float) -> str:
    """Wait until the monotonic time `by`, then end the process and all that it started."""
    try:
        status = process.wait(timeout=max(0.0, by - time.monotonic()))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        # One that hangs in the driver is not ended by that; the sections after it may still run.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
        return "stopped: out of time"
    return OK if status == 0 else f"{FAILED}: status {status}"


def build_extension(log: Path, seconds: float) -> str:
    """Build the C++ extension in place, for this Python.

    Placement has a torch path without it, so a build that fails is no failure of the run.
    """
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    outcome = finish(start(command, log), by=time.monotonic() + seconds)
    check = (
        "from latentwire_fast.readers import kv_placement\n"
        "raise SystemExit(not kv_placement.has_extension())"
    )
    loads = subprocess.run(
        [sys.executable, "-c", check], cwd=ROOT, env=environment(), capture_output=True, check=False
    )
    if loads.returncode == 0:
        return OK
    why = next(reversed(log.read_text(errors="replace").strip().splitlines()), "no output")
    return f"not built ({outcome}): {why}"


def driver() -> str | None:
    """Version of the GPU's driver; None without one."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None
