"""The tests that need a GPU, as sections of a run: which there are, and how they went."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import Any

from bench.processes import OK, ROOT, finish, start

# A GPU machine's pytest may be older than the project's, and its libraries may warn.
PYTEST = (
    *(sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider"),
    *("-o", "minversion=0", "-W", "default"),
)
# Of a kernels' file. Five files, and a few others, on 16 cores.
PROCESSES = 3
# Seconds for pytest to say, when its time is over, why tests failed.
LAST_WORDS = 5.0
# What a file may lack: the machine has no accelerate, with which training starts. Any other module
# that is missing is a failure, of conftest.py perhaps, and then of every file.
MAY_LACK = {"test_kernels_training.py": "accelerate"}
OUTCOME = re.compile(r"^(\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED)\b", re.MULTILINE)


def device_tests(tiny: bool) -> tuple[list[Path], list[Path]]:
    """Files whose tests all run kernels, and files with a few that need a GPU.

    Not the compiling tests, which need no GPU.
    """
    kernels, others = [], []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        text = path.read_text()
        if "needs_kernels" in text:
            kernels.append(path)
        elif "pytest.mark.gpu" in text:
            others.append(path)
    return (kernels[:1], []) if tiny else (kernels, others)


def run_tests(folder: Path, limit: float, *, tiny: bool) -> list[dict[str, Any]]:
    """Everything side by side: compiling, on one core each, takes most of the time.

    The kernels' files are dealt out to several processes; in a `tiny` run, where kernels are
    interpreted, two of these take one test each. Their output goes to logs in the folder.
    """
    started = time.monotonic()
    kernels, others = device_tests(tiny)
    hands = {path: dealt(path) for path in kernels}
    if tiny:
        hands = {path: [tests[:1] for tests in several[:2]] for path, several in hands.items()}
    commands = {path: [[*PYTEST, *tests] for tests in several] for path, several in hands.items()}
    commands |= {path: [[*PYTEST, "-m", "gpu", path]] for path in others}
    running = [
        (path, log := folder / f"{path.stem}.{number}.log", start(command, log))
        for path, several in commands.items()
        for number, command in enumerate(several)
    ]
    logs = dict.fromkeys(commands, "")
    endings = dict.fromkeys(commands, OK)
    for path, log, process in running:
        ending = finish(process, by=started + limit, last_words=LAST_WORDS)
        logs[path] += log.read_text(errors="replace") + "\n"
        endings[path] = ending if endings[path] == OK else endings[path]
    return [report_of(path.name, logs[path], endings[path]) for path in commands]


def dealt(path: Path) -> list[list[str]]:
    """The tests of a file for each of the processes that run it."""
    names = re.findall(r"^def (test_\w+)\(", path.read_text(), re.MULTILINE)
    tests = [f"{path}::{name}" for name in names]
    return [tests[number::PROCESSES] for number in range(min(PROCESSES, len(tests)))]


def report_of(file: str, log: str, ending: str) -> dict[str, Any]:
    """Counts from pytest's lines, which are there also when it was stopped."""
    outcomes = OUTCOME.findall(log)
    count = {word: sum(outcome == word for _, outcome in outcomes) for word in
             ("PASSED", "FAILED", "ERROR", "SKIPPED")}  # fmt: skip
    failed = count["FAILED"] + count["ERROR"]
    missing = re.search(r"ModuleNotFoundError: No module named '([\w.]+)'", log)
    note, bad = "", ending != OK or failed > 0
    if not outcomes and missing:
        note, bad = f"needs {missing[1]}", MAY_LACK.get(file) != missing[1].partition(".")[0]
    elif failed:
        note = "; ".join(name for name, word in outcomes if word in ("FAILED", "ERROR"))[:2000]
    elif ending != OK:
        note = f"{ending}: {next(reversed(log.strip().splitlines()), 'no output')[:200]}"
    return {
        "file": file,
        "passed": count["PASSED"],
        "failed": failed,
        "skipped": count["SKIPPED"],
        "note": note,
        "bad": bad,
    }
