"""Public files that are too large for the repository, where a copy is at hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def real_file(name: str) -> Path:
    """A file of the folder `shared/data` beside the repository, or in `LATENTWIRE_SHARED`; the test
    is skipped without it."""
    root = Path(__file__).parents[1].parent / "shared"
    path = Path(os.environ.get("LATENTWIRE_SHARED", root)) / "data" / name
    if not path.exists():
        pytest.skip(f"no copy of {name} here")
    return path
