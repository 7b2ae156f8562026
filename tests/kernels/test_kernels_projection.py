"""The projection kernels against the reference and fp64, on a GPU or interpreted."""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from eager import EPSILON, eager_project
from kernel_device import DEVICE, INTERPRETED, assert_guards_hold, guard_outputs, needs_kernels
from latentwire_fast import ops, reference
from latentwire_fast.ops import projection_cache

# The interpreter computes lanes that a `where` then drops, and numpy warns of those.
pytestmark = [needs_kernels, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

NAMES = ("weight", "bias", "norm_weight", "norm_bias", "gamma", "beta", "gain")
# (shape of x, D, tanh) of every way through the kernels, over rows and columns that fill no tile.
WAYS = {
    "gram": ((2, 67, 20), 137, False),
    "gram, an example a program": ((3, 7, 70), 40, False),
    "tiles, multiplied out": ((2, 67, 20), 137, True),
    "tiles, stored": ((2, 5, 300), 40, True),
    "tiles, stored, linear": ((2, 5, 520), 24, False),
}
# The interpreter cuts fp32 off to bf16 instead of rounding it, which is one-sided.
DTYPES = [torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])]
# (N, D, d). Interpreted, a real width takes seconds; on a GPU each size compiles, so that every one
# of them is there once.
SIZES = [(1, 3584, 32), (17, 4096, 48), (2048, 8192, 256)]
if INTERPRETED:
    SIZES = [(n, 136, d) for n in (1, 17) for d in (32, 48, 256)] + [(17, 1160, 48)]
# Payloads (shape of the latent, bits, group size): groups that end inside rows, short last groups.
# Every code once, the other shapes with three codes that hold each width and each group size.
CODES = list(zip(ops.CODE_BITS, ops.GROUP_SIZES, strict=True))
PAYLOADS = [(s, *code) for s in ((2, 1, 5, 7), (5, 48), (0, 3, 8)) for code in CODES]
PAYLOADS += [
    ((3, 7, 20), bits, group)
    for bits, group in (product(ops.CODE_BITS, ops.GROUP_SIZES) if INTERPRETED else CODES)
]


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
    project: Callable[..., Tensor],
    dtype: torch.dtype,
    tensors: list[Tensor],
    present: tuple[str, ...] = NAMES,
    *,
    weights: Tensor | None = None,
    **settings: Any,
) -> list[Tensor]:
    """The output and every gradient, in fp64; weights: the gradient that comes in."""
    leaves = [t.to(DEVICE, dtype).detach().clone().requires_grad_() for t in tensors]
    parameters = dict(zip(NAMES, leaves[1:], strict=True))
    parameters = {name: p for name, p in parameters.items() if name in present}
    used = [leaves[0], *parameters.values()]
    out = project(leaves[0], **parameters, target_rms=0.5, **settings)
    if weights is None:
        weights = torch.linspace(-1, 1, out.numel(), device=DEVICE).view(out.shape)
    return [t.double() for t in (out.detach(), *torch.autograd.grad(out, used, weights.to(dtype)))]


def ours(*arguments: Any, **settings: Any) -> list[Tensor]:
    with ops.backend("triton"):
        return run(ops.project_calibrate, *arguments, **settings)


def truth(tensors: list[Tensor], *present: Any, **settings: Any) -> list[Tensor]:
    with ops.backend("reference"):
        return run(ops.project_calibrate, torch.float64, tensors, *present, **settings)


def worst(found: Tensor, exact: Tensor) -> float:
    """The largest error as a share of the largest number."""
    if not found.numel():
        return 0.0
    return ((found - exact).abs().max() / exact.abs().max().clamp(min=1e-6)).item()


@pytest.mark.parametrize("calibration", ops.CALIBRATIONS)
@pytest.mark.parametrize("way", WAYS)
def test_values_and_gradients(way: str, calibration: str) -> None:
    """fp32 within 1e-4 of fp64."""
    shape, width, tanh = WAYS[way]
    tensors = inputs(shape, width)
    settings = {"calibration": calibration, "tanh": tanh}
    found = ours(torch.float32, tensors, **settings)
    for f, e in zip(found, truth(tensors, **settings), strict=True):
        assert worst(f, e) <= 1e-4


@pytest.mark.parametrize("calibration", ops.CALIBRATIONS if INTERPRETED else ["example"])
@pytest.mark.parametrize("tanh", [False, True])
def test_each_argument_may_be_absent(calibration: str, tanh: bool) -> None:
    tensors = inputs((2, 3, 20), 24)
    settings = {"calibration": calibration, "tanh": tanh}
    without = [{name} for name in NAMES[1:]] + [{"norm_weight", "norm_bias"}, set(NAMES[1:])]
    for absent in without:
        if absent == {"norm_weight"}:  # an error: its bias is there
            continue
        present = tuple(name for name in NAMES if name not in absent)
        found = ours(torch.float32, tensors, present, **settings)
        for f, e in zip(found, truth(tensors, present, **settings), strict=True):
            assert worst(f, e) <= 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width", "inner"), SIZES)
@pytest.mark.parametrize("tanh", [False, True])
def test_no_worse_than_same_dtype_eager(
    dtype: torch.dtype, rows: int, width: int, inner: int, tanh: bool
) -> None:
    """Values and gradients, against fp64 of the same rounded inputs."""
    tensors = [t.to(dtype).float() for t in inputs((rows, inner), width)]
    settings: dict[str, Any] = {"calibration": "token", "tanh": tanh}
    out = truth(tensors, **settings)[0]
    # In part along the output: else nearly all of the gain's gradient cancels, and what is left is
    # rounding, eager's too.
    along = 0.3 * out / out.square().mean().sqrt()
    weights = torch.linspace(-1, 1, out.numel(), device=DEVICE).view(out.shape) + along
    settings["weights"] = weights.to(dtype)
    exact = truth(tensors, **settings)
    eager = run(eager_project, dtype, tensors, **settings)
    for o, e, t in zip(ours(dtype, tensors, **settings), eager, exact, strict=True):
        assert worst(o, t) <= worst(e, t) + EPSILON[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("tanh", [False, True])
def test_extreme_rows(dtype: torch.dtype, normed: bool, tanh: bool) -> None:
    """Rows of zeros, of denormals, of the largest numbers; constant rows (not of the largest before
    a LayerNorm, to which rounding then is all there is)."""
    sizes = {torch.float32: (0.0, 1e-40, 1e-20, 1e-4, 1e15), torch.float16: (0.0, 6e-8, 1e-3, 6e2)}
    x = torch.randn(10, 48)
    x[5:] = 1.0
    scale = torch.tensor(sizes[dtype])
    x[: len(scale)] *= scale[:, None]
    count = len(scale) - normed
    x[5 : 5 + count] *= scale[:count, None]
    tensors = inputs((10, 48), 40)
    tensors[0] = x.to(dtype).float()
    present = ("weight", "norm_weight", "gamma") if normed else ("weight", "gamma")
    found = ours(dtype, tensors, present, tanh=tanh)
    exact = truth([t.to(dtype) for t in tensors], present, tanh=tanh)
    assert found[0].isfinite().all()
    for row, expected in zip(found[0], exact[0], strict=True):
        torch.testing.assert_close(row, expected, rtol=1e-2, atol=2e-3)


# (shape of x, D): a row, no rows, no examples, examples of no rows, rows of no values, no outputs.
FEW = [((1, 8), 24), ((0, 8), 24), ((0, 3, 8), 24), ((2, 0, 8), 24), ((2, 3, 0), 24), ((2, 8), 0)]


@pytest.mark.parametrize("calibration", ops.CALIBRATIONS)
@pytest.mark.parametrize(("shape", "width"), FEW)
def test_few_rows_and_none(shape: tuple[int, ...], width: int, calibration: str) -> None:
    """Values and gradients, NaN where the reference has NaN (the mean square of nothing)."""
    tensors = inputs((*shape[:-1], max(shape[-1], 1)), width)
    if not shape[-1]:
        tensors = [t[..., :0] if i in (0, 1, 3, 4) else t for i, t in enumerate(tensors)]
    for tanh in (False, True):
        settings = {"calibration": calibration, "tanh": tanh}
        found = ours(torch.float32, tensors, **settings)
        for f, e in zip(found, truth(tensors, **settings), strict=True):
            torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("calibration", ops.CALIBRATIONS)
@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8), (2, 3, 0)])
def test_an_empty_payload_to_prefix(shape: tuple[int, ...], calibration: str) -> None:
    arguments = packed(shape, 4, 32)
    weight, bias = torch.ones(5, shape[-1], device=DEVICE), torch.ones(5, device=DEVICE)
    settings: dict[str, Any] = {"weight": weight, "bias": bias, "calibration": calibration}
    results = []
    for backend in ("triton", "reference"):
        with ops.backend(backend):
            results.append(
                ops.dequantize_project_calibrate(**arguments, **settings, target_rms=1.0)
            )
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("tanh", [False, True])
def test_strided_inputs_and_frozen_parameters(tanh: bool) -> None:
    """x a transposed view, the weight a slice, vectors every other number; x's gradient alone."""
    x = torch.randn(6, 4, 20).transpose(0, 1)
    weight = torch.randn(40, 30)[:, 5:25]
    vectors = {name: torch.randn(80)[::2] for name in ("bias", "gamma", "beta")}
    vectors |= {name: torch.randn(40)[::2] for name in ("norm_weight", "norm_bias")}
    grads = []
    for backend in ("triton", "reference"):
        leaf = x.detach().to(DEVICE).requires_grad_()
        moved = {name: v.to(DEVICE) for name, v in vectors.items()}
        with ops.backend(backend):
            out = ops.project_calibrate(
                *(leaf, weight.to(DEVICE)),
                **moved,
                target_rms=1.0,
                calibration="example",
                tanh=tanh,
            )
            grads.append(torch.autograd.grad(out.square().sum() + out.sum(), leaf)[0])
    assert worst(*grads) <= 1e-3


@pytest.mark.parametrize("calibration", ["token", "example", "batch"])
@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_written_outside_or_read_unwritten(
    way: str, calibration: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every buffer is cut out of a poisoned one: the results are the same and the rims whole."""
    shape, width, tanh = WAYS[way]
    tensors = inputs(shape, width)
    settings = {"calibration": calibration, "tanh": tanh}
    expected = ours(torch.float32, tensors, **settings)
    with monkeypatch.context() as patch:
        buffers = guard_outputs(patch)
        found = ours(torch.float32, tensors, **settings)
    assert len(buffers) >= 5
    assert_guards_hold(buffers)
    for f, e in zip(found, expected, strict=True):
        assert torch.equal(f, e)


# --- groups of outputs ----------------------------------------------------------------------------

# (shape of x, D, groups, tanh): a tile's width or not, more tiles than one a group, wide rows
# whose product is stored, narrow groups.
GROUPED = {
    "groups as wide as a tile": ((2, 67, 20), 128, 4, False),
    "groups of a tile and a rest": ((3, 5, 20), 402, 2, False),
    "narrow groups": ((2, 9, 20), 20, 4, True),
    "stored": ((2, 5, 300), 144, 3, False),
}


def grouped_inputs(way: str) -> tuple[list[Tensor], dict[str, Any]]:
    shape, width, groups, tanh = GROUPED[way]
    tensors = inputs(shape, width)
    tensors[1] *= torch.logspace(-1, 1, groups).repeat_interleave(width // groups)[:, None]
    tensors[-1] = torch.linspace(0.5, 2, groups)
    return tensors, {"groups": groups, "tanh": tanh}


@pytest.mark.parametrize("calibration", ops.CALIBRATIONS)
@pytest.mark.parametrize("way", GROUPED)
def test_values_and_gradients_in_groups(way: str, calibration: str) -> None:
    """fp32 within 1e-4 of fp64, each group's gain gradient too."""
    tensors, settings = grouped_inputs(way)
    settings["calibration"] = calibration
    found = ours(torch.float32, tensors, **settings)
    for f, e in zip(found, truth(tensors, **settings), strict=True):
        assert worst(f, e) <= 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("calibration", ["none", "example"])
def test_keys_and_values_in_half_precision(dtype: torch.dtype, calibration: str) -> None:
    """A deep prefix's projection: weight, bias and gains; no worse than eager, group by group."""
    tensors, settings = grouped_inputs("stored")
    tensors = [t.to(dtype).float() for t in tensors]
    present = ("weight", "bias", "gain")
    groups, width = settings["groups"], len(tensors[1])
    settings["calibration"] = calibration

    def eager(x: Tensor, weight: Tensor, bias: Tensor, gain: Tensor, **_: Any) -> Tensor:
        y = (x @ weight.T + bias).unflatten(-1, (groups, width // groups))
        if calibration == "example":
            mean_square = y.square().mean((1, 3), keepdim=True)
            y = y * 0.5 / (mean_square + reference.RMS_EPS).sqrt()
        return (y * gain[:, None]).flatten(-2)

    exact = truth(tensors, present, **settings)
    theirs = run(eager, dtype, tensors, present, **settings)
    for o, e, t in zip(ours(dtype, tensors, present, **settings), theirs, exact, strict=True):
        assert worst(o, t) <= worst(e, t) + EPSILON[dtype]


@pytest.mark.parametrize(
    ("way", "calibration"),
    [*((way, "example") for way in GROUPED), ("narrow groups", "token"), ("stored", "batch")],
)
def test_groups_write_nothing_outside_and_read_nothing_unwritten(
    way: str, calibration: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Poisoned buffers again; and a NaN stays in its group, in rows that share its mean square."""
    tensors, settings = grouped_inputs(way)
    settings["calibration"] = calibration
    expected = ours(torch.float32, tensors, **settings)
    with monkeypatch.context() as patch:
        buffers = guard_outputs(patch)
        found = ours(torch.float32, tensors, **settings)
    assert len(buffers) >= 5
    assert_guards_hold(buffers)
    for f, e in zip(found, expected, strict=True):
        assert torch.equal(f, e)
    tensors[2][0] = torch.nan  # the first output's bias: of the first group
    with ops.backend("reference"):
        broken = run(ops.project_calibrate, torch.float32, tensors, **settings)
    assert torch.equal(ours(torch.float32, tensors, **settings)[0].isnan(), broken[0].isnan())
    assert not broken[0].isnan().all()


@pytest.mark.parametrize("calibration", ["none", "token", "example"])
def test_payload_to_keys_and_values(calibration: str) -> None:
    arguments = packed((3, 7, 20), 6, 16)
    tensors, _ = grouped_inputs("groups as wide as a tile")
    parameters = {n: t.to(DEVICE) for n, t in zip(NAMES, tensors[1:], strict=True)}
    settings: dict[str, Any] = {**parameters, "target_rms": 0.5, "calibration": calibration}
    with ops.backend("triton"):
        x = ops.unpack_dequantize(**arguments)
        found = ops.dequantize_project_calibrate(**arguments, **settings, groups=4)
        expected = ops.project_calibrate(x, **settings, groups=4)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


# --- payloads -------------------------------------------------------------------------------------


def packed(shape: tuple[int, ...], bits: int, group: int) -> dict[str, Any]:
    codes, scales = ops.quantize_pack(torch.randn(shape), bits=bits, group_size=group)
    code = {"codes": codes.to(DEVICE), "scales": scales.to(DEVICE), "shape": shape}
    return {**code, "bits": bits, "group_size": group}


@pytest.mark.parametrize(("shape", "bits", "group"), PAYLOADS)
def test_payload_to_prefix(shape: tuple[int, ...], bits: int, group: int) -> None:
    """The same as unpacking first."""
    arguments = packed(shape, bits, group)
    _, *tensors = (t.to(DEVICE) for t in inputs(shape, 24))
    parameters = dict(zip(NAMES, tensors, strict=True))
    with ops.backend("triton"):
        x = ops.unpack_dequantize(**arguments)
        for calibration, tanh in (("token", False), ("example", True), ("example", False)):
            settings: dict[str, Any] = {**parameters, "target_rms": 0.5, "tanh": tanh}
            settings["calibration"] = calibration
            found = ops.dequantize_project_calibrate(**arguments, **settings)
            expected = ops.project_calibrate(x, **settings)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        half = ops.dequantize_project_calibrate(**arguments, **settings, dtype=torch.float16)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), expected, rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("calibration", ["token", "example", "batch"])
def test_a_payload_is_not_unpacked_into_memory(
    calibration: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No buffer holds the latent `[N, d]`: rows `[s x, s, 1, 0 ...]` `[N, K]` and mean squares."""
    arguments = packed((2, 70, 24), 4, 32)
    weight = torch.randn(40, 24, device=DEVICE)
    buffers = guard_outputs(monkeypatch)
    settings: dict[str, Any] = {"weight": weight, "target_rms": 1.0, "calibration": calibration}
    with ops.backend("triton"):
        ops.dequantize_project_calibrate(**arguments, **settings)
    assert_guards_hold(buffers)
    sizes = {buffer.numel() - 128 for buffer in buffers}
    assert 140 * 32 in sizes
    assert 140 * 24 not in sizes


# --- folded parameters ----------------------------------------------------------------------------


class Counted:
    """`kernels.projection.fold`, counted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from latentwire_fast.kernels import projection

        self.calls, fold = 0, projection.fold

        def counted(*arguments: Any, **settings: Any) -> Any:
            self.calls += 1
            return fold(*arguments, **settings)

        monkeypatch.setattr(projection, "fold", counted)


def assert_current(x: Tensor, parameters: dict[str, Tensor]) -> None:
    """What the kernels give is what the parameters, as they are now, ask for."""
    with ops.backend("triton"):
        found = ops.project_calibrate(x, **parameters, target_rms=0.5)
    with ops.backend("reference"):
        expected = ops.project_calibrate(x, **parameters, target_rms=0.5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_frozen_parameters_are_folded_once_and_again_when_they_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, weight, bias, _, _, gamma, _, _ = (t.to(DEVICE) for t in inputs((5, 20), 24))
    parameters = {"weight": weight, "bias": bias, "gamma": gamma}
    counted = Counted(monkeypatch)
    assert_current(x, parameters)
    assert_current(x, parameters)
    assert counted.calls == 1
    changes: list[Callable[[], object]] = [
        lambda: weight.mul_(2),
        lambda: bias.add_(1),
        lambda: gamma[3:4].zero_(),  # through a view
        lambda: setattr(weight, "data", weight.data * 3),  # other memory
        lambda: parameters.update(bias=bias.clone()),
        lambda: parameters.pop("gamma"),
    ]
    for change, folded in zip(changes, (2, 3, 4, 5, 6, 7), strict=True):
        change()
        assert_current(x, parameters)
        assert_current(x, parameters)
        assert counted.calls == folded
    with torch.inference_mode():
        assert_current(x, parameters)  # tensors made outside keep their versions
        assert counted.calls == 7
        parameters["weight"] = weight.clone()
        assert_current(x, parameters)
        assert_current(x, parameters)
    assert counted.calls == 9


def test_parameters_that_train_are_folded_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, *_ = (t.to(DEVICE) for t in inputs((5, 20), 24))
    weight.requires_grad_()
    counted = Counted(monkeypatch)
    optimiser = torch.optim.SGD([weight], lr=0.1)
    for step in range(3):
        assert_current(x, {"weight": weight})
        with ops.backend("triton"):
            ops.project_calibrate(x, weight, target_rms=0.5, calibration="none").sum().backward()
        optimiser.step()
        assert counted.calls == 2 * (step + 1)  # forward; backward uses its forward's
    weight.requires_grad_(False)
    assert_current(x, {"weight": weight})


def test_a_fold_goes_with_its_weight() -> None:
    before = len(projection_cache._folds)
    x, weight, *_ = (t.to(DEVICE) for t in inputs((5, 20), 24))
    assert_current(x, {"weight": weight})
    assert len(projection_cache._folds) == before + 1
    del weight
    gc.collect()
    assert len(projection_cache._folds) == before


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="4 GiB of output")
@pytest.mark.parametrize(("inner", "tanh"), [(32, False), (32, True), (520, False)])
def test_offsets_beyond_2_31(inner: int, tanh: bool) -> None:
    """The last rows of an output of more than 2^31 numbers, and their gradients."""
    rows, width = 2**19 + 3, 4096
    tensors = [t.to("cuda", torch.bfloat16) for t in inputs((17, inner), width)]
    few, *rest = tensors
    x = few.repeat(-(-rows // 17), 1)[:rows].requires_grad_()
    parameters = dict(zip(NAMES, rest, strict=True))
    out = ops.project_calibrate(x, **parameters, target_rms=0.5, tanh=tanh)
    out.backward(torch.ones((), device="cuda", dtype=out.dtype).expand_as(out))
    assert x.grad is not None
    last = x.detach()[-17:].clone().requires_grad_()
    expected = ops.project_calibrate(last, **parameters, target_rms=0.5, tanh=tanh)
    expected.backward(torch.ones_like(expected))
    assert worst(out[-17:].double(), expected.double()) <= 1e-2
    assert worst(x.grad[-17:].double(), last.grad.double()) <= 1e-2


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.skipif(INTERPRETED, reason="there is no host to wait for")
@pytest.mark.parametrize("calibration", ops.CALIBRATIONS)
@pytest.mark.parametrize("way", WAYS)
def test_nothing_waits_for_the_gpu(way: str, calibration: str) -> None:
    """Forward and backward without a host synchronisation; the first call compiles."""
    shape, width, tanh = WAYS[way]
    leaves = [t.to("cuda").requires_grad_() for t in inputs(shape, width)]
    frozen = dict(zip(NAMES, (t.detach() for t in leaves[1:]), strict=True))
    payload = packed(shape, 4, 32)
    settings: dict[str, Any] = {"target_rms": 0.5, "calibration": calibration, "tanh": tanh}

    def step() -> None:
        parameters = dict(zip(NAMES, leaves[1:], strict=True))
        ops.project_calibrate(leaves[0], **parameters, **settings).sum().backward()
        ops.dequantize_project_calibrate(**payload, **frozen, **settings)

    step()
    mode = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("error")  # sets it, and then warns
        step()
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="graphs are CUDA's")
def test_a_captured_graph_sees_new_weights() -> None:
    """Folding is part of the graph: what was folded before its capture is not used in it."""
    x, weight, *_ = (t.to("cuda") for t in inputs((5, 32), 64))
    settings: dict[str, Any] = {"target_rms": 0.5}
    ops.project_calibrate(x, weight, **settings)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.project_calibrate(x, weight, **settings)
    weight.normal_()
    graph.replay()
    with ops.backend("reference"):
        expected = ops.project_calibrate(x, weight, **settings)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("calibration", ["token", "example", "batch"])
def test_a_broken_row_shows(calibration: str) -> None:
    """NaN in every row that shares its mean square, and in no other: no maximum drops it."""
    x, weight, *_ = inputs((2, 3, 20), 24)
    x[0, 1, 4] = torch.nan
    settings: dict[str, Any] = {"target_rms": 0.5, "calibration": calibration}
    expected = ops.project_calibrate(x, weight, **settings)
    with ops.backend("triton"):
        found = ops.project_calibrate(x.to(DEVICE), weight.to(DEVICE), **settings)
    assert torch.equal(found.cpu().isnan(), expected.isnan())


def test_mean_squares_are_the_reference_s() -> None:
    """r2 through the Gram matrix where W x and b nearly cancel, and where they are 0."""
    x, weight, *_ = (t.to(DEVICE) for t in inputs((4, 32), 64))
    x[1] = 0
    bias = -(weight @ x[0])
    settings = reference.ProjectionSettings(1.0, "token", 1, False)
    exact = reference.ProjectionParameters(weight.double(), bias.double())
    _, expected = reference.project_calibrate(x.double(), exact, settings)
    with ops.backend("triton"):
        op = torch.ops.latentwire_fast.project_calibrate
        _, squares = op(x, *reference.ProjectionParameters(weight, bias), *settings)
    typical = expected.max()
    assert squares.min() >= 0
    assert (squares - expected).abs().max() <= 1e-5 * typical
