"""Wheels that were brought in a folder to a machine without a network."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def install(wheels: Iterable[Path], target: Path) -> str:
    """Unpack the wheels of what cannot be imported here; the folder, if any was needed."""
    needed = [str(wheel) for wheel in wheels if not _has(wheel.name.split("-")[0])]
    if not needed:
        return ""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "install"]
    options = ["--no-index", "--no-deps", "--no-compile", "--upgrade", "--target", str(target)]
    subprocess.run([*pip, *options, *needed], check=True)
    return str(target)


def offer(folder: Path, target: Path) -> None:
    """Make the wheels of a folder importable to the processes that are started from here. One that
    does not install is told, and costs its rows of the tables only."""
    for wheel in sorted(folder.glob("*.whl")):
        try:
            where = install([wheel], target)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"{wheel.name} is left out: {error}", file=sys.stderr)
            continue
        known = os.environ.get("PYTHONPATH", "")
        if where and where not in known.split(os.pathsep):
            os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [known, where]))


def _has(distribution: str) -> bool:
    try:
        return bool(version(distribution))
    except PackageNotFoundError:
        return False
