"""K2 against eager torch and torch.compile: LayerNorm, projection, RMS calibration, affine.

pytest bench/bench_adapter.py --benchmark-only
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import DEVICE, DTYPE, measure, shapes, worst
from torch import Tensor
from torch.nn import functional as F

from latentwire_fast import ops

TARGET_RMS = 0.02
# (N, d_z, D)
SHAPES = shapes([(2048, 256, 4096), (16384, 256, 4096), (2048, 256, 3584)], [(64, 32, 96)])


def eager(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    """What a user writes."""
    normed = F.layer_norm(x, x.shape[-1:], p["norm_weight"], p["norm_bias"])
    y = F.linear(normed, p["weight"], p["bias"])
    rms = (y.float().square().mean(-1, keepdim=True) + 1e-8).sqrt()
    return p["gamma"] * (y * (TARGET_RMS / rms).to(y.dtype)) + p["beta"]


def ours(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    return ops.project_calibrate(x, **p, target_rms=TARGET_RMS)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("row", ["ours", "eager", "compile"])
def test_project_calibrate(
    benchmark: Any, row: str, backward: bool, shape: tuple[int, int, int]
) -> None:
    if row == "compile" and DEVICE == "cpu":
        pytest.skip("compared on a GPU only")
    rows, inner, width = shape
    sizes = {"weight": (width, inner), "bias": (width,), "norm_weight": (inner,)}
    sizes |= {"norm_bias": (inner,), "gamma": (width,), "beta": (width,)}
    parameters = {name: torch.randn(size) * 0.06 for name, size in sizes.items()}
    x, grad = torch.randn(rows, inner).to(DTYPE), torch.randn(rows, width).to(DTYPE)
    parameters = {name: p.to(DTYPE) for name, p in parameters.items()}
    truth = eager(x.double(), {name: p.double() for name, p in parameters.items()})
    x, grad = x.to(DEVICE).requires_grad_(backward), grad.to(DEVICE)
    parameters = {n: p.to(DEVICE).requires_grad_(backward) for n, p in parameters.items()}
    forward = ours if row == "ours" else eager
    if row == "compile":
        forward = torch.compile(eager)

    def call() -> Tensor:
        out = forward(x, parameters)
        if backward:
            torch.autograd.grad(out, (x, *parameters.values()), grad)
        return out

    error = worst(call().detach().cpu(), truth)
    moved = rows * width * (1 + 2 * backward) + width * inner * (1 + backward)
    measure(
        benchmark,
        call,
        error=error,
        allowed=1e-4 if DTYPE is torch.float32 else 2e-2,
        traffic=moved * DTYPE.itemsize,
        flops=2 * rows * width * inner * (1 + 2 * backward),
    )
