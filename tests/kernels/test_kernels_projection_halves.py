"""Half precision rows of the projection: their factor, their Gram matrix, codes in whole groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from eager import EPSILON, eager_project
from kernel_device import DEVICE, INTERPRETED, needs_kernels
from latentwire_fast import ops, reference

pytestmark = [needs_kernels, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

# The interpreter cuts fp32 off to bf16 instead of rounding it, which is one-sided.
DTYPES = [torch.float16, *([] if INTERPRETED else [torch.bfloat16])]
NAMES = ("weight", "bias", "norm_weight", "norm_bias", "gamma", "beta")
# (shape of x, D): fewer outputs than values, examples a program of padded rows, examples that are
# more than a program holds.
SHAPES = [((2, 3, 20), 12), ((2, 9, 48), 72), ((2, 70, 32), 40)]


def tensors(shape: tuple[int, ...], width: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """x and the parameters, in this dtype."""
    inner = shape[-1]
    found = {
        "x": torch.randn(shape),
        "weight": torch.randn(width, inner) * inner**-0.5,
        "bias": torch.randn(width) * 0.1,
        "norm_weight": 1 + 0.1 * torch.randn(inner),
        "norm_bias": torch.randn(inner) * 0.1,
        "gamma": 1 + 0.1 * torch.randn(width),
        "beta": torch.randn(width) * 0.01,
    }
    return {name: t.to(DEVICE, dtype) for name, t in found.items()}


def error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).abs().max() / exact.abs().max()).item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "width"), SHAPES)
@pytest.mark.parametrize("calibration", ["token", "example", "batch"])
@pytest.mark.parametrize("trained", [False, True])
def test_no_worse_than_same_dtype_eager(
    dtype: torch.dtype, shape: tuple[int, ...], width: int, calibration: str, trained: bool
) -> None:
    """By the factor, of frozen parameters, and by the Gram matrix, of those that train."""
    given = tensors(shape, width, dtype)
    settings: dict[str, Any] = {"target_rms": 0.5, "calibration": calibration}
    with ops.backend("reference"):
        exact = ops.project_calibrate(**{k: t.double() for k, t in given.items()}, **settings)
    eager = eager_project(**given, **settings)
    given["weight"].requires_grad_(trained)
    with ops.backend("triton"):
        found = ops.project_calibrate(**given, **settings).detach()
    assert found.dtype == dtype
    assert error(found, exact) <= error(eager, exact) + EPSILON[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_factor_loses_nothing_where_w_x_and_b_cancel(dtype: torch.dtype) -> None:
    """There the Gram matrix of a half precision knows nothing; the factor is as good as y is."""
    given = tensors((4, 32), 64, dtype)
    x, weight = given["x"], given["weight"]
    bias = (0.01 * torch.randn(64, device=DEVICE) - weight.float() @ x[0].float()).to(dtype)
    settings: dict[str, Any] = {"target_rms": 1.0}
    with ops.backend("reference"):
        exact = ops.project_calibrate(x.double(), weight.double(), bias.double(), **settings)
    y = (x @ weight.T + bias).float()
    eager = y / (y.square().mean(-1, keepdim=True) + reference.RMS_EPS).sqrt()
    with ops.backend("triton"):
        found = ops.project_calibrate(x, weight, bias, **settings)
    for row in range(4):
        limit = 2 * error(eager[row], exact[row]) + EPSILON[dtype]
        assert error(found[row], exact[row]) <= limit


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outputs", "scale"), [(40, 1.0), (9, 1.0), (40, 1e4), (40, 1e-6), (7, 0)])
def test_the_factor_has_the_norms_of_the_parameters(
    dtype: torch.dtype, outputs: int, scale: float
) -> None:
    """More outputs than values and fewer; weights that fp16 cannot hold the squares of; zeros."""
    from latentwire_fast.kernels.projection_halves import factor_of

    plain = torch.zeros(outputs, 24)
    plain[:, :21] = scale * torch.randn(outputs, 21)
    factor = factor_of(plain, 20, dtype)
    assert factor.matrix.dtype == dtype
    assert factor.matrix.shape == (21, 24)
    x = torch.randn(5, 20).double()
    y = x @ factor.matrix[:20, :20].double() + factor.matrix[20, :20].double()
    found = y.square().sum(1) * factor.constants[0] + factor.constants[1]
    expected = (x @ plain[:, :20].double().T + plain[:, 20].double()).square().sum(1)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)


def payload(shape: tuple[int, ...], bits: int, group: int, scale: float = 1.0) -> dict[str, Any]:
    codes, scales = ops.quantize_pack(torch.randn(shape) * scale, bits=bits, group_size=group)
    code = {"codes": codes.to(DEVICE), "scales": scales.to(DEVICE), "shape": shape}
    return {**code, "bits": bits, "group_size": group}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", ops.CODE_BITS)
@pytest.mark.parametrize(
    ("shape", "group"), [((3, 5, 32), 16), ((2, 40, 96), 32), ((2, 3, 24), 16), ((5, 64), 64)]
)
@pytest.mark.parametrize(
    ("calibration", "tanh"), [("example", False), ("none", False), ("token", True)]
)
def test_codes_are_unpacked_on_the_way(
    dtype: torch.dtype, bits: int, shape: tuple[int, ...], group: int, calibration: str, tanh: bool
) -> None:
    """Whole groups in a row of a power of 2 or of another width, and groups that end inside rows:
    what the unpacked rows give, but for their own rounding to the half precision."""
    arguments = payload(shape, bits, group)
    given = tensors(shape, 24, dtype)
    x = ops.unpack_dequantize(**arguments)
    parameters = {name: given[name] for name in NAMES}
    settings: dict[str, Any] = {"target_rms": 0.5, "calibration": calibration, "tanh": tanh}
    with ops.backend("reference"):
        doubles = {name: t.double() for name, t in parameters.items()}
        exact = ops.project_calibrate(x.double(), **doubles, **settings)
    with ops.backend("triton"):
        found = ops.dequantize_project_calibrate(**arguments, **parameters, **settings)
    assert error(found, exact) <= 4 * EPSILON[dtype]


def test_a_payload_beyond_fp16_is_computed_in_fp32() -> None:
    """Without LayerNorm nothing bounds the unpacked values; the calibration does bound the rows."""
    arguments = payload((3, 5, 32), 8, 32, 1e5)
    weight = torch.randn(24, 32, device=DEVICE).half()
    settings: dict[str, Any] = {"weight": weight, "target_rms": 0.5}
    with ops.backend("triton"):
        found = ops.dequantize_project_calibrate(**arguments, **settings)
    with ops.backend("reference"):
        expected = ops.dequantize_project_calibrate(**arguments, **settings)
    assert (
        reference.unpack_dequantize(
            *(arguments["codes"], arguments["scales"]),
            **{"bits": 8, "group_size": 32, "values": 160, "dtype": torch.float32},
        )
        .abs()
        .max()
        > 65504
    )
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=2e-3)
