"""Without a GPU: runs every kernel's tests once more, interpreted, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernel_device import INTERPRETED

TESTS = Path(__file__).parent
FILES = sorted(TESTS.glob("test_kernels_*.py"))
COMMAND = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu"]


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="they run directly")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_interpreted(path: Path) -> None:
    pytest.importorskip("triton")
    if path.stem in {"test_kernels_interpreted", "test_kernels_aot"}:
        return
    done = subprocess.run(
        [*COMMAND, str(path)],
        cwd=TESTS.parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert " skipped" not in done.stdout
