"""What holds for every test that runs on a device, with nothing beyond pytest, numpy and torch.

    PYTHONPATH=.:tests pytest --noconftest -p device_suite tests/test_kernels_quantize.py

is how `bench/gpu_kernels.py` runs tests where conftest.py's imports are not installed.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

# Read once, when the libraries are imported.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import numpy as np
import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


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
    return Path(__file__).parents[1]
