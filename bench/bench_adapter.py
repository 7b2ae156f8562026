"""K2 against eager torch and torch.compile: LayerNorm, projection, RMS calibration, affine.

pytest bench/bench_adapter.py --benchmark-only
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from ceilings import Stage
from clocks import Call, Inputs
from harness import (
    AUTOTUNED,
    DEVICE,
    Case,
    Errors,
    Forward,
    Row,
    compiled,
    dtype_of,
    grid,
    relative_error,
    report_row,
)
from torch import Tensor
from torch.nn import functional as F

from latentwire_fast import ops

TARGET_RMS = 0.02
# Eager torch itself must be this close to fp64 for its row to count.
EAGER_LIMIT = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
# (N, d_z, D)
SHAPES = [(2048, 256, 4096), (16384, 256, 4096), (2048, 256, 3584)]
SMALL = [(64, 32, 96)]


def eager(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    gamma: Tensor,
    beta: Tensor,
) -> Tensor:
    """What a user writes."""
    normed = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias)
    y = F.linear(normed, weight, bias)
    rms = (y.float().square().mean(-1, keepdim=True) + 1e-8).sqrt()
    return gamma * (y * (TARGET_RMS / rms).to(y.dtype)) + beta


def ours(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    gamma: Tensor,
    beta: Tensor,
) -> Tensor:
    return ops.project_calibrate(
        *(x, weight, bias),
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        gamma=gamma,
        beta=beta,
        target_rms=TARGET_RMS,
    )


def ours_frozen(*inputs: Tensor) -> Tensor:
    """With what frozen parameters give kept from an earlier call.

    While a graph is recorded the op makes it anew, so that replays see weights written since. Here
    nobody writes any.
    """
    with mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=False):
        return ours(*inputs)


def make_inputs(shape: tuple[int, int, int], dtype: torch.dtype, *, backward: bool) -> Inputs:
    """x and the six parameters, and last the gradient that comes in; the first seven trained."""
    rows, inner, width = shape
    random = [
        torch.randn(rows, inner),
        torch.randn(width, inner) * inner**-0.5,
        torch.randn(width) * 0.1,
        1 + 0.1 * torch.randn(inner),
        0.1 * torch.randn(inner),
        1 + 0.1 * torch.randn(width),
        0.01 * torch.randn(width),
    ]
    tensors = [t.to(DEVICE, dtype).requires_grad_(backward) for t in random]
    return (*tensors, torch.randn(rows, width).to(DEVICE, dtype))


def step(forward: Forward, *, backward: bool) -> Call:
    """The output, and with `backward` every gradient."""

    def call(inputs: Inputs) -> list[Tensor]:
        *leaves, grad = inputs
        out = forward(*leaves)
        if not backward:
            return [out]
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    return call


def exact(inputs: Inputs, *, backward: bool) -> list[Tensor]:
    leaves = [t.detach().double().requires_grad_(t.requires_grad) for t in inputs]
    return [t.detach() for t in step(eager, backward=backward)(tuple(leaves))]


def errors(found: list[Tensor], inputs: Inputs, truth: list[Tensor]) -> Errors:
    pairs = list(zip(found, truth, strict=True))
    result = {"output": relative_error(*pairs[0])}
    if len(pairs) > 1:
        result["gradients"] = max(relative_error(f, t) for f, t in pairs[1:])
    return result


def work(shape: tuple[int, int, int], element: int, *, backward: bool) -> Stage:
    """Forward: x and W in, the output out, one product. Backward besides: the gradient, x and W in,
    those of x and W out, two products."""
    n, d, width = shape
    tensors = n * width + n * d + width * d
    if backward:
        tensors += n * width + 2 * (n * d + width * d)
    return Stage(tensors * element, 2 * n * d * width * (3 if backward else 1), 1)


def design(shape: tuple[int, int, int], element: int, *, backward: bool) -> tuple[Stage, ...]:
    """Launches of `kernels/adapter.py` and `adapter_backward.py`, K the padded width of a row."""
    n, d, width = shape
    k = -(-(d + 2) // 8) * 8
    rows, weights, output = n * k * element, width * k * element, n * width * element
    product = 2 * n * width * k
    gram = Stage(weights + 4 * k * k, 2 * width * k * k)
    forward = (
        # fp32 products of bf16 are three of the matrix units' own.
        Stage(n * d * element + rows, 3 * n * d * d),
        Stage(rows + weights + output, product),
    )
    if not backward:
        return forward
    fold = (Stage(3 * weights), gram)  # of parameters that train: anew in either direction
    sums = 4 * n * k
    outer = 4 * width * k
    return (
        *(*fold, *forward, *fold),
        Stage(output + weights + sums, product),  # along
        Stage(n * d * element + sums),  # dots
        Stage(n * d * element + 2 * rows, launches=4),  # scaled and weighted rows
        Stage(rows + 2 * sums, 2 * n * k * k, launches=3),  # what calibration takes away
        Stage(3 * sums, launches=4),  # LayerNorm's own
        Stage(output + rows + outer, product),  # dW and its like
        Stage(8 * outer, 2 * n * k * k, launches=12),  # the parameters' gradients from it
    )


def make_case(shape: tuple[int, int, int], dtype: torch.dtype, *, backward: bool) -> Case:
    def row(make: Callable[[], Forward], **limits: float) -> Row:
        return Row(lambda: step(make(), backward=backward), limits)

    limit = EAGER_LIMIT[dtype]
    return Case(
        *("K2", f"project and calibrate, {'forward+backward' if backward else 'forward'}"),
        *(shape, dtype),
        work=work(shape, dtype.itemsize, backward=backward),
        design=design(shape, dtype.itemsize, backward=backward),
        inputs=lambda: make_inputs(shape, dtype, backward=backward),
        truth=lambda inputs: exact(inputs, backward=backward),
        errors=errors,
        rows={
            "ours": row(lambda: ours if backward else ours_frozen),
            "eager": row(lambda: eager, output=limit, gradients=limit),
            "compile": row(lambda: compiled(eager)),
            AUTOTUNED: row(lambda: compiled(eager, mode=AUTOTUNED)),
        },
    )


def cases(*, gpu: bool = DEVICE == "cuda") -> list[Case]:
    """Forward at every shape, then forward and backward."""
    shapes = SHAPES if gpu else SMALL
    return [make_case(s, dtype_of(gpu), backward=b) for b in (False, True) for s in shapes]


@pytest.mark.parametrize(**grid(cases()))
def test_project_calibrate(benchmark: Any, case: Case, row: str) -> None:
    report_row(benchmark, case, row)
