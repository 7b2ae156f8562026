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
    arguments = (codes, scales, 6, 16, [2, 3, 5], torch.float32, *p.values(), 0.5, "token")
    torch.library.opcheck(op, (*arguments, 1, False))
    p["gain"] = torch.rand(7)
    arguments = (codes, scales, 6, 16, [2, 3, 5], torch.float32, *p.values(), 0.5, "token")
    torch.library.opcheck(op, (*arguments, 7, False))


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


# --- groups of outputs ----------------------------------------------------------------------------


def by_the_group(
    x: Tensor, weight: Tensor, bias: Tensor, *, gain: Tensor, target: Tensor, **settings: Any
) -> Tensor:
    """A projection per group, one beside the other."""
    groups = len(gain)
    parts = [
        ops.project_calibrate(x, w, b, target_rms=float(t), gain=g, **settings)
        for w, b, t, g in zip(
            weight.chunk(groups), bias.chunk(groups), target, gain.unbind(), strict=True
        )
    ]
    return torch.cat(parts, -1)


@pytest.mark.parametrize("calibration", ops.CALIBRATIONS)
@pytest.mark.parametrize("tanh", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 5), (3, 5), (2, 1, 3, 5)])
def test_groups_are_projections_side_by_side(
    shape: tuple[int, ...], calibration: str, tanh: bool
) -> None:
    """In fp64: values and every gradient, by autograd through the others and by gradcheck."""
    wide = {"dtype": torch.float64, "requires_grad": True}
    leaves = [torch.randn(s, **wide) for s in (shape, (12, 5), (12,))]
    gain = (1 + 0.3 * torch.randn(4, dtype=torch.float64)).requires_grad_()
    target = torch.tensor([0.02, 3.0, 0.5, 40.0], dtype=torch.float64)
    settings: dict[str, Any] = {"calibration": calibration, "tanh": tanh}

    def project(x: Tensor, weight: Tensor, bias: Tensor, gain: Tensor) -> Tensor:
        return ops.project_calibrate(
            x, weight, bias, gain=gain, target_rms=target, groups=4, **settings
        )

    out, expected = (
        f(*leaves, **{"gain": gain, **more})
        for f, more in ((project, {}), (by_the_group, {"target": target, **settings}))
    )
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-15)
    weights = torch.randn_like(out)
    grads = [torch.autograd.grad(o, (*leaves, gain), weights) for o in (out, expected)]
    for found, exact in zip(*grads, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-13)
    assert torch.autograd.gradcheck(project, (*leaves, gain))


def test_groups_with_every_parameter() -> None:
    """LayerNorm before; gamma and beta run over all outputs, outside of the groups."""
    parameters = adapter_parameters(5, 12)
    del parameters["gain"]
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    gain = torch.rand(3, dtype=torch.float64, requires_grad=True)

    def project(x: Tensor, gain: Tensor, *values: Tensor) -> Tensor:
        named = dict(zip(parameters, values, strict=True))
        return ops.project_calibrate(
            x, **named, gain=gain, target_rms=0.5, groups=3, calibration="example"
        )

    assert torch.autograd.gradcheck(project, (x, gain, *parameters.values()))


@pytest.mark.parametrize("calibration", ["token", "example", "batch"])
def test_each_group_reaches_its_target(calibration: str) -> None:
    x = torch.randn(3, 4, 16) * torch.tensor([0.1, 1, 10])[:, None, None]
    weight = torch.randn(32, 16) * torch.tensor([0.01, 1, 30, 4]).repeat_interleave(8)[:, None]
    target = torch.tensor([0.03, 2.0, 0.5, 7.0])
    out = ops.project_calibrate(
        x, weight, target_rms=target, gain=2.0, calibration=calibration, groups=4
    )
    dims = {"token": (-1,), "example": (1, 3), "batch": (0, 1, 3)}[calibration]
    rms = out.unflatten(-1, (4, 8)).square().mean(dims).sqrt()
    torch.testing.assert_close(rms, (2 * target).expand(rms.shape), rtol=1e-3, atol=0)


def test_groups_save_x_mean_squares_and_parameters_only() -> None:
    x = torch.randn(2, 3, 5, requires_grad=True)
    weight, gain = torch.randn(12, 5, requires_grad=True), torch.rand(4, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.project_calibrate(x, weight, gain=gain, target_rms=1.0, groups=4)
    known = {t.data_ptr() for t in (x, weight, gain)}
    assert [tuple(t.shape) for t in saved if t.data_ptr() not in known] == [(2, 3, 4)]


def test_a_number_or_one_element_stands_for_every_group() -> None:
    x, weight = torch.randn(2, 3, 5), torch.randn(12, 5)
    settings: dict[str, Any] = {"groups": 4, "calibration": "token"}
    expected = ops.project_calibrate(
        x, weight, target_rms=torch.full((4,), 0.5), gain=torch.full((4,), 3.0), **settings
    )
    for target in (0.5, torch.tensor(0.5), torch.tensor([0.5])):
        for gain in (3.0, torch.tensor(3.0), torch.tensor([3.0])):
            found = ops.project_calibrate(x, weight, target_rms=target, gain=gain, **settings)
            torch.testing.assert_close(found, expected)


def test_payload_to_prefix_in_groups() -> None:
    arguments, gain = payload((2, 3, 5)), torch.rand(4, requires_grad=True)
    settings: dict[str, Any] = {"weight": torch.randn(12, 5), "gain": gain, "target_rms": 0.5}
    x = ops.unpack_dequantize(**arguments)
    expected = ops.project_calibrate(x, **settings, groups=4)
    trained = ops.dequantize_project_calibrate(**arguments, **settings, groups=4)
    with torch.no_grad():
        frozen = ops.dequantize_project_calibrate(**arguments, **settings, groups=4)
    assert torch.equal(trained, expected)
    assert torch.equal(frozen, expected)
    grads = [torch.autograd.grad(out.sum(), gain)[0] for out in (trained, expected)]
    assert torch.equal(*grads)


# --- bad arguments --------------------------------------------------------------------------------

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
    "groups of no size": (
        ConfigError,
        "project_calibrate: groups is 0; expected a whole number of at least 1",
        lambda: project(groups=0),
    ),
    "groups that do not divide": (
        KernelError,
        "project_calibrate: 4 outputs do not divide among 3 groups; expected rows of weight in",
        lambda: project(groups=3),
    ),
    "a gain for each of too many": (
        KernelError,
        r"project_calibrate: gain has shape \(4,\); expected one element or 2, one a group",
        lambda: project(groups=2, gain=torch.ones(4)),
    ),
    "a target for each of too many": (
        KernelError,
        r"project_calibrate: target_rms has shape \(3,\); expected one element or 2, one a group",
        lambda: project(groups=2, target_rms=torch.ones(3)),
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
