"""The tests that need a GPU, as sections of a run: which there are, and how they went."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import Any

from processes import OK, ROOT, finish, start

# Of the tests' time for the kernels' own; the rest is for the others.
KERNELS_SHARE = 0.75
# A GPU machine's pytest may be older than the project's, and its libraries may warn.
PYTEST = (
    *(sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider"),
    *("-o", "minversion=0", "-W", "default"),
)
OUTCOME = re.compile(r"^(\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED)\b", re.MULTILINE)


def device_tests(tiny: bool) -> tuple[list[Path], list[Path]]:
    """Files whose tests all run kernels, and files with a few that need a GPU.

    Not the compiling tests, which need no GPU.
    """
    kernels, others = [], []
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        text = path.read_text()
        if "needs_kernels" in text:
            kernels.append(path)
        elif "pytest.mark.gpu" in text:
            others.append(path)
    return (kernels[:1], []) if tiny else (kernels, others)


def run_tests(folder: Path, limit: float, *, tiny: bool) -> list[dict[str, Any]]:
    """The kernels' files side by side (compiling takes most of their time), then the others.

    Their output goes to logs in the folder. A file that imports what is not installed counts as
    skipped.
    """
    started = time.monotonic()
    kernels, others = device_tests(tiny)
    logs = {path: folder / f"{path.stem}.log" for path in (*kernels, *others)}
    side_by_side = [start([*PYTEST, path], logs[path]) for path in kernels]
    by = started + KERNELS_SHARE * limit
    endings = [finish(process, by=by) for process in side_by_side]
    by = started + limit
    endings += [finish(start([*PYTEST, "-m", "gpu", p], logs[p]), by=by) for p in others]
    return [
        report_of(path.name, logs[path].read_text(errors="replace"), ending)
        for path, ending in zip(logs, endings, strict=True)
    ]


def report_of(file: str, log: str, ending: str) -> dict[str, Any]:
    """Counts from pytest's lines, which are there also when it was stopped."""
    outcomes = OUTCOME.findall(log)
    count = {word: sum(outcome == word for _, outcome in outcomes) for word in
             ("PASSED", "FAILED", "ERROR", "SKIPPED")}  # fmt: skip
    failed = count["FAILED"] + count["ERROR"]
    missing = re.search(r"ModuleNotFoundError: No module named '([\w.]+)'", log)
    note, bad = "", ending != OK or failed > 0
    if not outcomes and missing:
        note, bad = f"needs {missing[1]}", False
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
