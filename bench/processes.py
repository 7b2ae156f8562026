"""Sections of a run on a GPU: processes with a time limit each, for which the checkout imports."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path

from bench.wheels import offer

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


def finish(process: subprocess.Popen[bytes], *, by: float, last_words: float = 0.0) -> str:
    """Wait until the monotonic time `by`, then end the process and all that it started.

    Args:
        last_words: seconds of these for a process that is interrupted first, as by Ctrl-C.
    """
    try:
        status = process.wait(timeout=max(0.0, by - last_words - time.monotonic()))
    except subprocess.TimeoutExpired:
        if last_words:
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=max(0.0, by - time.monotonic()))
        os.killpg(process.pid, signal.SIGKILL)
        # One that hangs in the driver is not ended by that; the sections after it may still run.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
        return "stopped: out of time"
    return OK if status == 0 else f"{FAILED}: status {status}"


def build_extension(log: Path, seconds: float) -> str:
    """Build the C++ extension in place, for this Python, unless one for this source is there.

    Placement has a torch path without it, so a build that fails is no failure of the run.
    """
    if _extension_loads():
        return OK
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    outcome = finish(start(command, log), by=time.monotonic() + seconds)
    if _extension_loads():
        return OK
    why = next(reversed(log.read_text(errors="replace").strip().splitlines()), "no output")
    return f"not built ({outcome}): {why}"


def _extension_loads() -> bool:
    """Whether the package finds one with the interface that it expects."""
    check = (
        "from latentwire_fast.readers import kv_placement\n"
        "raise SystemExit(not kv_placement.has_extension())"
    )
    loads = subprocess.run(
        [sys.executable, "-c", check], cwd=ROOT, env=environment(), capture_output=True, check=False
    )
    return loads.returncode == 0


def missing_tools() -> list[str]:
    """What Triton needs besides itself, and this machine lacks: it compiles a small C program for
    every kernel, with the headers of this Python. Without it, no kernel runs."""
    missing = []
    compilers = [os.environ.get("CC", ""), "gcc", "clang", "cc"]
    if not any(shutil.which(name) for name in compilers if name):
        missing.append("no C compiler (gcc or clang; or set CC)")
    include = sysconfig.get_paths()["include"]
    folders = [include, *filter(None, os.environ.get("CPATH", "").split(os.pathsep))]
    if not any((Path(folder) / "Python.h").is_file() for folder in folders):
        missing.append(f"no Python.h in {include} (install python3-dev, or set CPATH)")
    return missing


def ready(program: str, *, tiny: bool, wheels: Path, target: Path) -> bool:
    """Whether a run on this GPU can begin; if not, why is said. Wheels in a folder are unpacked.

    Args:
        tiny: on a CPU, where there is no GPU and nothing is compiled.
        target: for what is in the wheels.
    """
    import torch

    problems = [] if tiny else missing_tools()
    if not (torch.cuda.is_available() or tiny):
        problems.insert(0, "it needs a CUDA device, and torch sees none")
    for problem in problems:
        print(f"{program}: {problem}", file=sys.stderr)
    if not problems:
        offer(wheels, target)
    return not problems


def driver() -> str | None:
    """Version of the GPU's driver; None without one."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None
