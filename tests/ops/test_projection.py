"""The projection's ops beyond `test_ops.py`: payload to prefix, real widths, bad arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from eager import EPSILON, adapter_parameters, eager_project
from latentwire_fast import ops, reference
from latentwire_fast.errors import ConfigError, KernelError, LatentWireError

CODE: dict[str, Any] = {"bits": 6, "group_size": 16}


def payload(shape: tuple[int, ...]) -> dict[str, Any]:
    codes, scales = ops.quantize_pack(torch.randn(shape), **CODE)
    return {"codes": codes, "scales": scales, "shape": shape, **CODE}


@pytest.mark.parametrize("calibration", ops.CALIBRATIONS)
@pytest.mark.parametrize("tanh", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 5), (3, 5), (2, 1, 3, 5)])
def test_payload_to_prefix_is_unpacking_and_projecting(
    shape: tuple[int, ...], calibration: str, tanh: bool
) -> None:
    """In fp64 exactly; with a gradient asked for, and without."""
    arguments, parameters = payload(shape), adapter_parameters(5, 7)
    settings = {"target_rms": 0.02, "calibration": calibration, "tanh": tanh}
    x = ops.unpack_dequantize(**arguments, dtype=torch.float64)
    expected = ops.project_calibrate(x, **parameters, **settings)
    trained = ops.dequantize_project_calibrate(**arguments, **parameters, **settings)
    with torch.no_grad():
        frozen = ops.dequantize_project_calibrate(**arguments, **parameters, **settings)
    assert torch.equal(trained, expected)
    assert torch.equal(frozen, expected)
    weights = torch.randn_like(expected)
    for found, exact in zip(
        torch.autograd.grad(trained, list(parameters.values()), weights),
        torch.autograd.grad(expected, list(parameters.values()), weights),
        strict=True,
    ):
        assert torch.equal(found, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_payload_to_prefix_rounds_once(dtype: torch.dtype) -> None:
    """The unpacked latent is not rounded to the result's dtype, which is the weight's."""
    arguments = payload((2, 3, 5))
    parameters = {k: v.detach().to(dtype) for k, v in adapter_parameters(5, 7).items()}
    out = ops.dequantize_project_calibrate(**arguments, **parameters, target_rms=0.5)
    assert out.dtype == dtype
    x = ops.unpack_dequantize(**arguments)
    expected = ops.project_calibrate(x, **parameters, target_rms=0.5)
    assert torch.equal(out, expected.to(dtype))
    wide = ops.dequantize_project_calibrate(
        **arguments, **parameters, target_rms=0.5, dtype=torch.float32
    )
    assert torch.equal(wide, expected)


def test_opcheck() -> None:
    p = {k: v.detach() for k, v in adapter_parameters(5, 7, torch.float32).items()}
    codes, scales = reference.quantize_pack(torch.randn(2, 15), **CODE)
    op = torch.ops.latentwire_fast.dequantize_project_calibrate.default
    arguments = (codes, scales, 6, 16, [2, 3, 5], torch.float32, *p.values(), 0.5, "token", False)
    torch.library.opcheck(op, arguments)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_fullgraph_compile_equals_eager() -> None:
    arguments = payload((2, 3, 5))
    parameters = {k: v.detach() for k, v in adapter_parameters(5, 7, torch.float32).items()}

    def call(codes: Tensor) -> Tensor:
        return ops.dequantize_project_calibrate(
            **{**arguments, "codes": codes}, **parameters, target_rms=0.5, calibration="example"
        )

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(arguments["codes"]), call(arguments["codes"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "inner", "width"), [(1, 32, 8192), (17, 48, 3584), (17, 256, 4096), (2048, 32, 3584)]
)
def test_real_widths_are_no_worse_than_same_dtype_eager(
    dtype: torch.dtype, rows: int, inner: int, width: int
) -> None:
    x = torch.randn(rows, inner).to(dtype)
    parameters = adapter_parameters(inner, width, dtype, gain=False)
    parameters = {name: p.detach() for name, p in parameters.items()}
    settings: dict[str, Any] = {"target_rms": 1.0, "calibration": "token"}
    ours = ops.project_calibrate(x, **parameters, **settings)
    eager = eager_project(x, **parameters, **settings)
    wide = {name: p.double() for name, p in parameters.items()}
    truth = eager_project(x.double(), **wide, **settings)
    scale = truth.abs().max()
    error, allowed = ((t - truth).abs().max() / scale for t in (ours, eager))
    assert error <= allowed + EPSILON[dtype]


LATENT, WEIGHT = torch.zeros(2, 3, 8), torch.zeros(4, 8)
CODES, SCALES = torch.zeros(2, 18, dtype=torch.uint8), torch.zeros(2, 2, dtype=torch.float16)


def to_prefix(**changes: Any) -> Tensor:
    arguments: dict[str, Any] = {"codes": CODES, "scales": SCALES, "shape": (2, 3, 8), **CODE}
    return ops.dequantize_project_calibrate(
        **{**arguments, "weight": WEIGHT, "target_rms": 1.0, **changes}
    )


def project(**changes: Any) -> Tensor:
    return ops.project_calibrate(**{"x": LATENT, "weight": WEIGHT, "target_rms": 1.0, **changes})


BAD_CALLS: dict[str, tuple[type[LatentWireError], str, Callable[[], object]]] = {
    "codes": (
        KernelError,
        r"dequantize_project_calibrate: codes has shape \(2, 18\); expected \(2, 24\)",
        lambda: to_prefix(shape=(2, 4, 8)),
    ),
    "bits": (
        ConfigError,
        "dequantize_project_calibrate: bits is 5; expected one of",
        lambda: to_prefix(bits=5),
    ),
    "scales in fp32": (
        KernelError,
        "dequantize_project_calibrate: codes, scales and result are torch.uint8, torch.float32",
        lambda: to_prefix(scales=SCALES.float()),
    ),
    "an integer result": (
        KernelError,
        "and torch.int32; expected torch.uint8, torch.float16 and a floating-point dtype",
        lambda: to_prefix(dtype=torch.int32),
    ),
    "weight of a payload": (
        KernelError,
        r"dequantize_project_calibrate: weight has shape \(4, 9\); expected \(4, 8\)",
        lambda: to_prefix(weight=torch.zeros(4, 9)),
    ),
    "target of a payload": (
        ConfigError,
        "dequantize_project_calibrate: target_rms is 0.0; calibration 'token' needs a positive",
        lambda: to_prefix(target_rms=0.0),
    ),
    "integers": (KernelError, "x is torch.int64", lambda: project(x=LATENT.long())),
    "integer weight": (KernelError, "weight is torch.int64", lambda: project(weight=WEIGHT.long())),
    "integer bias": (
        KernelError,
        "project_calibrate: bias is torch.int64; expected a floating-point tensor",
        lambda: project(bias=torch.zeros(4, dtype=torch.int64)),
    ),
    "weight of one dimension": (
        KernelError,
        r"weight has shape \(8,\); expected at least 2 dimensions",
        lambda: project(weight=torch.zeros(8)),
    ),
    "norm bias alone": (
        KernelError,
        "norm_bias without norm_weight; give both, or norm_weight alone",
        lambda: project(norm_bias=torch.zeros(8)),
    ),
    "one example": (
        KernelError,
        r"x has shape \(8,\); expected at least 2 dimensions",
        lambda: project(x=torch.zeros(8), calibration="example"),
    ),
    "target": (
        ConfigError,
        "target_rms is inf; calibration 'batch' needs a positive number",
        lambda: project(target_rms=float("inf"), calibration="batch"),
    ),
    "device": (
        KernelError,
        "project_calibrate: gamma is on meta; expected cpu, like the input",
        lambda: project(gamma=torch.zeros(4, device="meta")),
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_arguments_say_what_was_expected(name: str) -> None:
    error, message, call = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        call()
