"""The projection kernels against the reference and fp64, on a GPU or interpreted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernel_device import DEVICE, needs_kernels
from latentwire_fast import ops

# The interpreter computes lanes that a `where` then drops, and numpy warns of those.
pytestmark = [needs_kernels, pytest.mark.filterwarnings("ignore::RuntimeWarning")]
NAMES = ("weight", "bias", "norm_weight", "norm_bias", "gamma", "beta", "gain")


def inputs(shape: tuple[int, ...], width: int) -> list[Tensor]:
    """x and the seven parameters, fp32."""
    inner = shape[-1]
    return [
        torch.randn(shape),
        torch.randn(width, inner) * inner**-0.5,
        torch.randn(width) * 0.1,
        1 + 0.1 * torch.randn(inner),
        torch.randn(inner) * 0.1,
        1 + 0.1 * torch.randn(width),
        torch.randn(width) * 0.01,
        torch.tensor(1.3),
    ]


def run(
    backend: Any,
    dtype: torch.dtype,
    tensors: list[Tensor],
    present: tuple[str, ...],
    **settings: Any,
) -> list[Tensor]:
    """The output and every gradient, in fp64 on the CPU."""
    device = DEVICE if backend == "triton" else "cpu"
    leaves = [t.clone().to(device, dtype).requires_grad_() for t in tensors]
    parameters = dict(zip(NAMES, leaves[1:], strict=True))
    parameters = {name: p for name, p in parameters.items() if name in present}
    used = [leaves[0], *parameters.values()]
    with ops.backend(backend):
        out = ops.project_calibrate(leaves[0], **parameters, target_rms=0.5, **settings)
        weights = torch.linspace(-1, 1, out.numel()).view(out.shape).to(device, dtype)
        grads = torch.autograd.grad(out, used, weights)
    return [t.detach().cpu().double() for t in (out, *grads)]


def assert_close(ours: list[Tensor], truth: list[Tensor], tolerance: float) -> None:
    for o, t in zip(ours, truth, strict=True):
        assert (o - t).abs().max() <= tolerance * max(t.abs().max().item(), 1e-6)


@pytest.mark.parametrize("calibration", ops.CALIBRATIONS)
@pytest.mark.parametrize("tanh", [False, True])
def test_values_and_gradients(calibration: str, tanh: bool) -> None:
    """Every calibration over rows and columns that fill no tile; fp32 within 1e-4 of fp64."""
    tensors = inputs((3, 50, 20), 137)
    settings = {"calibration": calibration, "tanh": tanh}
    ours = run("triton", torch.float32, tensors, NAMES, **settings)
    truth = run("reference", torch.float64, tensors, NAMES, **settings)
    assert_close(ours, truth, 1e-4)


@pytest.mark.parametrize(
    "present",
    [
        ("weight",),
        ("weight", "norm_weight"),
        ("weight", "gamma", "gain"),
        ("weight", "bias", "beta"),
    ],
)
def test_optional_parts(present: tuple[str, ...]) -> None:
    tensors = inputs((5, 70), 40)
    ours = run("triton", torch.float32, tensors, present)
    assert_close(ours, run("reference", torch.float64, tensors, present), 1e-4)


@pytest.mark.parametrize("calibration", ["none", "example"])
def test_half_precision(calibration: str) -> None:
    """fp16 storage: no worse than the format's own rounding of inputs and outputs."""
    tensors = [t.half().float() for t in inputs((2, 17, 48), 100)]
    ours = run("triton", torch.float16, tensors, NAMES, calibration=calibration)
    truth = run("reference", torch.float64, tensors, NAMES, calibration=calibration)
    assert_close(ours, truth, 4e-3)


@pytest.mark.parametrize("shape", [(0, 8), (1, 8)])
def test_few_rows(shape: tuple[int, int]) -> None:
    tensors = inputs(shape, 24)
    ours = run("triton", torch.float32, tensors, NAMES)
    truth = run("reference", torch.float64, tensors, NAMES)
    for o, t in zip(ours, truth, strict=True):
        torch.testing.assert_close(o, t, rtol=1e-4, atol=1e-5)


def test_frozen_parameters_and_strided_inputs() -> None:
    """Only the gradient asked for; x a transposed view, the weight a slice."""
    x = torch.randn(6, 4, 20).transpose(0, 1)
    weight = torch.randn(40, 30)[:, 5:25]
    grads = []
    for backend, device in (("triton", DEVICE), ("reference", "cpu")):
        leaf = x.detach().to(device).requires_grad_()
        with ops.backend(backend):
            out = ops.project_calibrate(
                leaf, weight.to(device), target_rms=1.0, calibration="example"
            )
            grads.append(torch.autograd.grad(out.square().sum() + out.sum(), leaf)[0].cpu())
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-4)
