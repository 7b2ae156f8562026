"""Where the kernels' tests run: on the GPU, or interpreted on the CPU in a process made for it.

`test_kernels_interpreted.py` starts that process with TRITON_INTERPRET=1, which must be set before
triton is imported; elsewhere without a GPU these tests are skipped.
"""

from __future__ import annotations

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
needs_kernels = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED,
    reason="no GPU; test_kernels_interpreted.py runs these interpreted",
)
