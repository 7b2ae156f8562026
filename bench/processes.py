"""Sections of a run on a GPU: processes with a time limit each, for which the checkout imports."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OK, FAILED = "done", "failed"


def environment() -> dict[str, str]:
    """That of the sections: the checkout is importable, nothing is fetched."""
    paths = [str(ROOT), str(ROOT / "bench"), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
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
        process.wait()
        return "stopped: out of time"
    return OK if status == 0 else f"{FAILED}: status {status}"
