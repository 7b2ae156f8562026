"""Refusing disks and ends of processes: what tests of saving are made of.

A pytest plugin (named in conftest.py) and a script. A test that ends processes leaves it to the
script to call its module's `case_NAME(folder)`: one small process without threads, so that it can
fork, and which has imported torch once for all cases.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from safetensors import SafetensorError

from latentwire_fast.files import atomic

STEPS = ("create", "write_tensors", "write_bytes", "sync", "rename", "remove")
CRASHED = 77  # the exit status of a process that ended as it was meant to
CASE_SECONDS = 600

InScript = Callable[[Callable[[Path], object], Path], dict]


class Disk(atomic.Disk):
    """The disk of a save with something done round each step: `around(name, path, do)`."""

    def __init__(self, around: Callable[[str, Path, Callable[[], None]], None]) -> None:
        for name in STEPS:
            real = getattr(atomic.Disk, name).__get__(self)
            setattr(self, name, self._wrapped(name, real, around))

    @staticmethod
    def _wrapped(name: str, real: Callable, around: Callable) -> Callable:
        return lambda path, *rest: around(name, path, lambda: real(path, *rest))


def failing(
    step: str, code: int, *, nth: int = 1
) -> Callable[[str, Path, Callable[[], None]], None]:
    """The `nth` disk step of a kind raises; a failing write leaves a torn file."""
    count = 0

    def around(name: str, path: Path, do: Callable[[], None]) -> None:
        nonlocal count
        count += name == step
        if name != step or count != nth:
            do()
            return
        if name.startswith("write"):
            path.write_bytes(b"torn")
        message = f"simulated: {os.strerror(code)}"
        # safetensors reports its own I/O errors
        raise SafetensorError(message) if step == "write_tensors" else OSError(code, message)

    return around


def in_child(act: Callable[[], object]) -> int:
    """Fork, run `act` in the child, return its exit status (0 when `act` came to its end)."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            act()
            os._exit(0)
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture(scope="session")
def in_script() -> Iterator[InScript]:
    """`in_script(case_NAME, folder)`: what `case_NAME(folder)` returns in a process of its own."""
    with subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:
        requests, answers = process.stdin, process.stdout
        assert requests is not None
        assert answers is not None

        def run(case: Callable[[Path], object], folder: Path) -> dict:
            requests.write(json.dumps([case.__module__, case.__name__, str(folder)]) + "\n")
            requests.flush()
            answer = json.loads(answers.readline())
            assert "result" in answer, answer["error"]
            return answer["result"]

        yield run
        requests.close()  # the script has read all, and ends


def serve() -> None:
    """Answer the requests on stdin, each in a fork.

    The module is imported first, so that the forks of later requests need not do it again.
    """
    for line in sys.stdin:
        with contextlib.suppress(Exception):  # the fork reports it
            importlib.import_module(json.loads(line)[0])
        status = in_child(partial(respond, *json.loads(line)))
        if status:
            write({"error": f"{line.strip()} ended with status {status}"})


def respond(module: str, case: str, folder: str) -> None:
    """Write what a case returns, or its traceback."""
    signal.alarm(CASE_SECONDS)
    try:
        write({"result": getattr(importlib.import_module(module), case)(Path(folder))})
    except Exception:
        write({"error": traceback.format_exc()})


def write(answer: dict) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    serve()
