"""Settings of every test: fixed seeds, deterministic torch, no network, hypothesis profiles."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Read once, when the libraries are imported.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# For the processes that tests start too: for models this small a second thread costs more than it
# does, and on a busy machine many times more.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

from kernel_device import SM90_TABLE

try:
    from hypothesis import settings
except ModuleNotFoundError:  # a bare GPU machine: the tests that need one do without
    settings = None

pytest_plugins = ["readers", "text_models", "crashes"]

# What a user's cache would hold goes with the test run, whose processes share it.
_CACHE = tempfile.TemporaryDirectory(prefix="latentwire-")
os.environ["LATENTWIRE_CACHE"] = _CACHE.name

REPOSITORY = Path(__file__).parents[1]

# `default` finds the same examples on every run; `make fuzz` looks for new ones.
if settings is not None:
    settings.register_profile("default", deadline=None, derandomize=True)
    settings.register_profile("fuzz", deadline=None, max_examples=5000, print_blob=True)
    settings.load_profile("default")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what the tests of compiled kernels found (`record_property`), whichever process ran
    them."""
    rows = [
        value
        for reports in terminalreporter.stats.values()
        for report in reports
        for key, value in getattr(report, "user_properties", ())
        if key == SM90_TABLE and report.when == "call"
    ]
    if not rows:
        return
    head = ("kernel", "registers", "shared", "stack", "local", "global accesses: bytes x count")
    width = max(len(row[0]) for row in rows)
    terminalreporter.section(SM90_TABLE)
    for name, *numbers, accesses in (head, *rows):
        columns = (f"{name:<{width}}", *(f"{x:>9}" for x in numbers), accesses)
        terminalreporter.write_line("  ".join(columns))


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    """Seeds everything. Deterministic mode also fills `torch.empty` with NaN, so that a read of
    memory that nobody wrote shows."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (libraries under test still draw from the global generator)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(True)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY
