"""Collects bench_*.py: `pytest bench --benchmark-only`."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_itemcollected(item: pytest.Item) -> None:
    """Warnings are no errors here: torch's compiler gives some, which would end a compilation."""
    item.add_marker(pytest.mark.filterwarnings("default"))


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """The files of this folder; pytest itself collects those that the command line names."""
    named = parent.session.isinitpath(file_path)
    if named or not file_path.match("bench_*.py"):
        return None
    return pytest.Module.from_parent(parent, path=file_path)
