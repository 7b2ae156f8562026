"""The calibrated projection (K2 of docs/kernels.md) against eager torch and torch.compile:
LayerNorm, projection, RMS calibration, affine; with tanh; from a payload's codes.

pytest bench/kernels/bench_projection.py --benchmark-only
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bench.kernels.ceilings import Stage
from bench.kernels.clocks import Call, Inputs
from bench.kernels.harness import (
    AUTOTUNED,
    DEVICE,
    Case,
    Forward,
    Row,
    compiled,
    dtype_of,
    grid,
    relative_error,
    report_row,
)
from bench.kernels.records import Errors
from latentwire_fast import ops, reference
from latentwire_fast.ops import projection_cache

TARGET_RMS = 0.02
# Eager torch itself must be this close to fp64 for its row to count.
EAGER_LIMIT = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
# (N, d_z, D)
SHAPES = [(2048, 256, 4096), (16384, 256, 4096), (2048, 256, 3584)]
SMALL = [(64, 32, 96)]
# Of these the other forms, which compile for long.
OTHER_FORMS = 2
# A payload's code, and how many rows of it are one example's.
CODE = {"bits": 4, "group_size": 32}
LATENTS = 32


def eager(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    gamma: Tensor,
    beta: Tensor,
    *,
    tanh: bool = False,
) -> Tensor:
    """The plain torch version."""
    normed = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias)
    y = F.linear(normed, weight, bias)
    y = y.tanh() if tanh else y
    rms = (y.float().square().mean(-1, keepdim=True) + 1e-8).sqrt()
    return gamma * (y * (TARGET_RMS / rms).to(y.dtype)) + beta


def named(parameters: tuple[Tensor, ...]) -> dict[str, Any]:
    """Parameters by the names of the ops' arguments."""
    names = ("weight", "bias", "norm_weight", "norm_bias", "gamma", "beta")
    return {**dict(zip(names, parameters, strict=True)), "target_rms": TARGET_RMS}


def ours(x: Tensor, *parameters: Tensor, tanh: bool = False) -> Tensor:
    return ops.project_calibrate(x, **named(parameters), tanh=tanh)


def frozen(forward: Forward) -> Forward:
    """A forward pass that uses what an earlier call stored of its frozen parameters.

    While a graph is recorded the op makes it anew, so that replays see weights written since. Here
    nobody writes any, but another graph's capture would free it, or another row's calls.
    """
    kept: dict[int, Any] = {}

    def run(*inputs: Tensor) -> Tensor:
        with mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=False):
            out = forward(*inputs)
        kept.update((id(fold), fold) for fold in projection_cache._folds.values())
        return out

    return run


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


def exact(plain: Forward, inputs: Inputs, *, backward: bool) -> list[Tensor]:
    leaves = [t.detach().double().requires_grad_(t.requires_grad) for t in inputs]
    return [t.detach() for t in step(plain, backward=backward)(tuple(leaves))]


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


def design(
    shape: tuple[int, int, int], element: int, *, backward: bool, source: float | None = None
) -> tuple[Stage, ...]:
    """Launches of `kernels/projection.py` and its backward pass, of turned rows: K = d.

    source: bytes that x comes from; its own unless given.
    """
    n, d, width = shape
    k = d
    rows, weights, output = n * k * element, width * k * element, n * width * element
    product = 2 * n * width * k
    gram = Stage(weights + 4 * k * k, 2 * width * k * k)
    forward = (
        # The factor of (W | b), or its Gram matrix.
        Stage((n * d * element if source is None else source) + rows, 2 * n * d * d),
        Stage(rows + weights + output, product),
    )
    if not backward:
        return forward
    fold = (Stage(3 * weights), gram)  # of parameters that train: forward's serves backward
    sums = 4 * n * k
    outer = 4 * width * k
    return (
        *(*fold, *forward),
        Stage(output + weights + sums, product),  # along
        Stage(n * d * element + sums + 2 * rows),  # its dots, scaled and weighted rows
        Stage(rows + 2 * sums, 2 * n * k * k, launches=2),  # what calibration takes away
        Stage(sums + 2 * n * d * element),  # LayerNorm's own
        Stage(output + rows + outer, product),  # dW and its like
        Stage(2 * rows, 2 * n * k * k, launches=2),  # what calibration takes of it
        Stage(weights + outer, 2 * width * k * k),
        Stage(2 * outer + 3 * weights, launches=3),  # the parameters' gradients
    )


def tanh_design(shape: tuple[int, int, int], element: int, *, backward: bool) -> tuple[Stage, ...]:
    """Launches of `kernels/projection_tiles.py`: y is multiplied out in each of two passes."""
    n, d, width = shape
    rows, weights, output = n * d * element, width * d * element, n * width * element
    product = 2 * n * width * d
    norm, sums = Stage(2 * rows), Stage(0.0, launches=2)
    forward = (
        *(norm, Stage(rows + weights, product)),
        Stage(rows + weights + output, product),
    )
    if not backward:
        return forward
    return (
        *(*forward, norm),
        *(Stage(rows + weights + output, product), sums),  # sums of v*y
        *(Stage(rows + weights + 2 * output, product), sums),  # y's gradient, and gamma's
        Stage(output + weights + 4 * n * d, product),  # that of the normalised rows
        Stage(12 * n * d, launches=4),  # LayerNorm's own
        Stage(output + rows + 4 * width * d, product),  # the weight's
        Stage(2 * output, launches=2),  # bias and beta
        Stage(8 * width * d, launches=8),
    )


def rows_of(
    ours: Forward, plain: Forward, dtype: torch.dtype, call: Callable[[Forward], Call]
) -> dict[str, Row]:
    limit = EAGER_LIMIT[dtype]
    return {
        "ours": Row(lambda: call(ours)),
        "eager": Row(lambda: call(plain), {"output": limit, "gradients": limit}),
        "compile": Row(lambda: call(compiled(plain))),
        AUTOTUNED: Row(lambda: call(compiled(plain, mode=AUTOTUNED))),
    }


def projection_case(
    shape: tuple[int, int, int], dtype: torch.dtype, *, backward: bool, tanh: bool = False
) -> Case:
    forward, plain = partial(ours, tanh=tanh), partial(eager, tanh=tanh)
    designed = tanh_design if tanh else design
    return Case(
        "K2",
        f"{'tanh, ' if tanh else ''}project and calibrate, "
        f"{'forward+backward' if backward else 'forward'}",
        *(shape, dtype),
        work=work(shape, dtype.itemsize, backward=backward),
        design=designed(shape, dtype.itemsize, backward=backward),
        inputs=lambda: make_inputs(shape, dtype, backward=backward),
        truth=lambda inputs: exact(plain, inputs, backward=backward),
        errors=errors,
        rows=rows_of(
            *(forward if backward else frozen(forward), plain, dtype),
            partial(step, backward=backward),
        ),
    )


def payload_case(shape: tuple[int, int, int], dtype: torch.dtype) -> Case:
    """A payload's codes to prefix embeddings, without the latent between in memory (`ours`), or by
    two ops."""
    rows, inner, _ = shape
    latent = (rows // LATENTS, LATENTS, inner)
    values = LATENTS * inner

    def inputs() -> Inputs:
        x, *parameters, _ = make_inputs(shape, torch.float32, backward=False)
        packed = reference.quantize_pack(x.view(-1, values), **CODE)
        return (*packed, *(p.to(dtype) for p in parameters))

    def unpacked(codes: Tensor, scales: Tensor, to: torch.dtype) -> Tensor:
        x = reference.unpack_dequantize(codes, scales, **CODE, values=values, dtype=to)
        return x.view(latent)

    def plain(codes: Tensor, scales: Tensor, *parameters: Tensor) -> Tensor:
        return eager(unpacked(codes, scales, dtype), *parameters)

    def one(codes: Tensor, scales: Tensor, *parameters: Tensor) -> Tensor:
        return ops.dequantize_project_calibrate(
            codes, scales, **CODE, shape=latent, **named(parameters)
        )

    def two(codes: Tensor, scales: Tensor, *parameters: Tensor) -> Tensor:
        x = ops.unpack_dequantize(codes, scales, **CODE, shape=latent, dtype=dtype)
        return ours(x, *parameters)

    def truth(inputs: Inputs) -> list[Tensor]:
        codes, scales, *parameters = inputs
        return [eager(unpacked(codes, scales, torch.float64), *(p.double() for p in parameters))]

    def call(forward: Forward) -> Call:
        return lambda inputs: [forward(*inputs)]

    found = rows_of(frozen(one), plain, dtype, call)
    packed = rows * inner * (CODE["bits"] / 8 + 2 / CODE["group_size"])
    whole = work(shape, dtype.itemsize, backward=False)
    return Case(
        *("K2", f"from a payload of {CODE['bits']} bits, forward", shape, dtype),
        work=replace(whole, traffic=whole.traffic - rows * inner * dtype.itemsize + packed),
        design=design(shape, dtype.itemsize, backward=False, source=packed),
        inputs=inputs,
        truth=truth,
        errors=errors,
        rows={**found, "ours, two ops": Row(lambda: call(frozen(two)))},
    )


def cases(*, gpu: bool = DEVICE == "cuda") -> list[Case]:
    """Forward at every shape, then forward and backward; then the other forms."""
    shapes, dtype = SHAPES if gpu else SMALL, dtype_of(gpu)
    found = [projection_case(s, dtype, backward=b) for b in (False, True) for s in shapes]
    for shape in shapes[:OTHER_FORMS]:
        found.append(payload_case(shape, dtype))
        found += [projection_case(shape, dtype, backward=b, tanh=True) for b in (False, True)]
    return found


@pytest.mark.parametrize(**grid(cases()))
def test_project_calibrate(benchmark: Any, case: Case, row: str) -> None:
    report_row(benchmark, case, row)
