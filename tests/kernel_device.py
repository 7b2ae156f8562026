"""Where the kernels' tests run: on the GPU, or interpreted on the CPU in a process made for it.

`test_kernels_interpreted.py` starts that process with TRITON_INTERPRET=1, which must be set before
triton is imported; elsewhere these tests are marked `gpu`, and skipped without one.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from latentwire_fast.ops.dispatch import Backend

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
needs_kernels = pytest.mark.skipif(False, reason="interpreted") if INTERPRETED else pytest.mark.gpu
# The backend of a test that runs a whole receiver, which checks payloads on the host: `triton`
# takes tensors on the CPU only where it is interpreted, and `auto` is Triton on a GPU.
KERNELS: Backend = "triton" if INTERPRETED else "auto"

GUARD, POISON = 64, 77
SM90_TABLE = "kernels compiled for sm_90"  # conftest.py prints what is recorded under this name


def guard_outputs(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """From now on `new_empty(size, dtype=...)` cuts tensors out of larger, poisoned buffers.

    Returns the buffers, as they come to be; `assert_guards_hold` looks at their ends.
    """
    buffers: list[Tensor] = []
    new_empty = torch.Tensor.new_empty

    def guarded(self: Tensor, size: Any, **options: Any) -> Tensor:
        if "dtype" not in options:  # the interpreter's own
            return new_empty(self, size, **options)
        shape = torch.Size([size] if isinstance(size, int) else size)
        buffer = torch.full((shape.numel() + 2 * GUARD,), POISON, device=self.device, **options)
        buffers.append(buffer)
        return buffer[GUARD : GUARD + shape.numel()].view(shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", guarded)
    return buffers


def assert_guards_hold(buffers: list[Tensor]) -> None:
    for buffer in buffers:
        assert (buffer[:GUARD] == POISON).all()
        assert (buffer[-GUARD:] == POISON).all()
