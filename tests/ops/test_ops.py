"""The public ops: gradients, registration, compilation, argument checks, memory."""

from __future__ import annotations

import logging
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from eager import EPSILON, adapter_parameters, eager_project
from latentwire_fast import ops, reference
from latentwire_fast.errors import ConfigError, KernelError, LatentWireError, PayloadError
from latentwire_fast.ops import dispatch

logger = logging.getLogger(__name__)
ROOT = Path(__file__).parents[2]

# --- quantisation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", ops.CODE_BITS)
@pytest.mark.parametrize("group_size", ops.GROUP_SIZES)
@pytest.mark.parametrize("shape", [(5, 7), (3, 4, 20), (2, 3, 1, 1), (2, 0, 4), (0, 3, 4)])
def test_pack_and_unpack_agree_with_fake_quantize(
    bits: int, group_size: int, shape: tuple[int, ...]
) -> None:
    z = torch.randn(shape)
    codes, scales = ops.quantize_pack(z, bits=bits, group_size=group_size)
    values = shape[-2] * shape[-1]
    length = reference.code_bytes(values, bits=bits, group_size=group_size)
    assert codes.shape == (*shape[:-2], length)
    assert scales.shape == (*shape[:-2], math.ceil(values / group_size))
    out = ops.unpack_dequantize(codes, scales, bits=bits, group_size=group_size, shape=shape)
    assert out.shape == shape
    assert torch.equal(out, ops.fake_quantize(z, bits=bits, group_size=group_size))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_quantisation_of_other_dtypes_and_layouts(dtype: torch.dtype) -> None:
    """Codes are those of the fp32 values; a transposed latent is read in its own order."""
    z = torch.randn(6, 20, 4, dtype=dtype).transpose(0, 1)
    codes, scales = ops.quantize_pack(z, bits=6, group_size=16)
    same = ops.quantize_pack(z.contiguous().float(), bits=6, group_size=16)
    assert torch.equal(codes, same[0])
    assert torch.equal(scales, same[1])
    out = ops.unpack_dequantize(
        codes, scales, bits=6, group_size=16, shape=tuple(z.shape), dtype=dtype
    )
    assert out.dtype == dtype
    assert torch.equal(out, ops.fake_quantize(z, bits=6, group_size=16))


def test_fake_quantize_gradient_is_the_identity_and_saves_nothing() -> None:
    z = torch.randn(2, 3, 20, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = ops.fake_quantize(z, bits=4, group_size=32)
    assert not saved
    weights = torch.randn_like(out)
    out.backward(weights)
    assert torch.equal(z.grad, weights)


@pytest.mark.parametrize("bits", ops.CODE_BITS)
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_encoding_a_latent_beyond_the_largest_scale_raises(
    bits: int, clip: bool, dtype: torch.dtype
) -> None:
    """Up to 65504 times the largest code (half a step more with `clip`), and not a rounding above;
    in training such values end at the limit."""
    limit = reference.largest_value(bits, clip=clip)
    assert limit == 65504 * (2 ** (bits - 1) - 1 + 0.5 * clip)
    code: dict[str, Any] = {"bits": bits, "group_size": 16, "clip": clip}
    z = torch.randn(2, 3, 20, dtype=dtype)
    z[1, 2, 3] = -limit
    codes, scales = ops.quantize_pack(z, **code)
    assert scales.max() == 65504
    del code["clip"]
    out = ops.unpack_dequantize(codes, scales, **code, shape=(2, 3, 20))
    assert out[1, 2, 3] == -65504 * (2 ** (bits - 1) - 1)
    z[1, 2, 3] = torch.tensor(-limit).nextafter(torch.tensor(-math.inf))
    with pytest.raises(PayloadError, match=rf"that {bits} bits can carry is {limit:.9g}: rescale"):
        ops.quantize_pack(z, **code, clip=clip)
    assert torch.equal(ops.fake_quantize(z.float(), **code, clip=clip), out)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_encoding_a_non_finite_latent_raises(bad: float) -> None:
    z = torch.randn(2, 3, 20)
    z[1, 2, 3] = bad
    with pytest.raises(PayloadError, match="quantize_pack: z holds NaN or Inf"):
        ops.quantize_pack(z, bits=4, group_size=16)
    assert ops.fake_quantize(z, bits=4, group_size=16)[1].isnan().any()


# --- projection -----------------------------------------------------------------------------------


@pytest.mark.parametrize("calibration", ops.CALIBRATIONS)
@pytest.mark.parametrize("tanh", [False, True])
def test_projection_value_and_gradients_in_fp64(calibration: str, tanh: bool) -> None:
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    parameters = adapter_parameters(5, 7)
    settings: dict[str, Any] = {"target_rms": 0.02, "calibration": calibration, "tanh": tanh}

    def project(x: Tensor, *values: Tensor) -> Tensor:
        return ops.project_calibrate(x, **dict(zip(parameters, values, strict=True)), **settings)

    out = project(x, *parameters.values())
    torch.testing.assert_close(out, eager_project(x, **parameters, **settings), rtol=1e-12, atol=0)
    assert torch.autograd.gradcheck(project, (x, *parameters.values()))


@pytest.mark.parametrize("calibration", ["token", "example", "batch"])
def test_projection_reaches_the_target_rms(calibration: str) -> None:
    x = torch.randn(3, 4, 16) * torch.tensor([0.1, 1, 10])[:, None, None]
    out = ops.project_calibrate(
        x, torch.randn(32, 16), target_rms=0.03, gain=2.0, calibration=calibration
    )
    dims = {"token": (-1,), "example": (-2, -1), "batch": (0, 1, 2)}[calibration]
    rms = out.square().mean(dims).sqrt()
    torch.testing.assert_close(rms, torch.full_like(rms, 0.06), rtol=1e-5, atol=0)


def test_projection_without_optional_parts() -> None:
    x, weight = torch.randn(4, 6), torch.randn(8, 6)
    out = ops.project_calibrate(x, weight, calibration="none")
    torch.testing.assert_close(out, x @ weight.T)
    out = ops.project_calibrate(x, weight, calibration="none", gain=torch.tensor(0.5))
    torch.testing.assert_close(out, 0.5 * (x @ weight.T))
    normed = ops.project_calibrate(x, weight, norm_weight=torch.ones(6), calibration="none")
    torch.testing.assert_close(normed, F.layer_norm(x, (6,)) @ weight.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("calibration", ops.CALIBRATIONS)
@pytest.mark.parametrize("shape", [(1, 1, 32, 96), (1, 17, 48, 100), (4, 32, 256, 384)])
def test_projection_is_no_worse_than_same_dtype_eager(
    dtype: torch.dtype, calibration: str, shape: tuple[int, int, int, int]
) -> None:
    batch, latents, inner, width = shape
    x = torch.randn(batch, latents, inner).to(dtype).requires_grad_()
    parameters = adapter_parameters(inner, width, dtype, gain=False)
    settings: dict[str, Any] = {"target_rms": 1.0, "calibration": calibration}
    weights = torch.randn(batch, latents, width)

    def run(project: Callable[..., Tensor], target: torch.dtype) -> list[Tensor]:
        inputs = [t.detach().to(target).requires_grad_() for t in (x, *parameters.values())]
        out = project(inputs[0], **dict(zip(parameters, inputs[1:], strict=True)), **settings)
        grads = torch.autograd.grad(out, inputs, weights.to(target))
        return [t.double() for t in (out, *grads)]

    truth = run(eager_project, torch.float64)
    eager = run(eager_project, dtype)
    ours = run(ops.project_calibrate, dtype)
    for t, e, o in zip(truth, eager, ours, strict=True):
        scale = t.abs().max()
        assert (o - t).abs().max() / scale <= (e - t).abs().max() / scale + EPSILON[dtype]


def test_projection_saves_x_mean_squares_and_parameters_only() -> None:
    x = torch.randn(2, 3, 5, requires_grad=True)
    parameters = adapter_parameters(5, 70, torch.float32)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.project_calibrate(x, **parameters, target_rms=1.0)
    known = {t.data_ptr() for t in (x, *parameters.values())}
    extra = [t for t in saved if t.data_ptr() not in known]
    assert [tuple(t.shape) for t in extra] == [(2, 3, 1)]


# --- distillation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ops.REDUCTIONS)
@pytest.mark.parametrize("tau", [0.5, 2.0])
def test_kl_gradients_in_fp64(reduction: Any, tau: float) -> None:
    student = torch.randn(2, 3, 11, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 3, 11, dtype=torch.float64) * 3
    teacher[0, 0, :4] = -torch.inf
    mask = torch.tensor([[True, True, False], [True, True, True]])

    def kl(student: Tensor) -> Tensor:
        return ops.kd_kl(student, teacher, tau=tau, mask=mask, reduction=reduction)

    assert torch.autograd.gradcheck(kl, student)
    log_q, p = (student / tau).log_softmax(-1), (teacher / tau).softmax(-1)
    rows = F.kl_div(log_q, p, reduction="none").sum(-1) * tau**2 * mask
    expected = {"none": rows, "sum": rows.sum(), "mean": rows.sum() / 5}[reduction]
    torch.testing.assert_close(kl(student), expected)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("separate", [False, True])
def test_linear_kl_gradients_in_fp64(softcap: float | None, separate: bool) -> None:
    """Shared and separate heads (the teacher's larger), with and without the head's gradient."""
    student = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 4, dtype=torch.float64, requires_grad=True)
    teacher_weight = torch.randn(13, 3, dtype=torch.float64) if separate else None
    teacher = torch.randn(2, 3, 3 if separate else 4, dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    settings: dict[str, Any] = {"tau": 2.0, "mask": mask, "chunk_rows": 2, "softcap": softcap}
    frozen = weight if teacher_weight is None else teacher_weight

    def kl(student: Tensor, weight: Tensor, reduction: Any = "mean") -> Tensor:
        return ops.linear_kd_kl(
            student, teacher, weight, teacher_weight=teacher_weight, reduction=reduction, **settings
        )

    def capped(logits: Tensor) -> Tensor:
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    other = capped(teacher @ frozen.detach().T)[..., :11]
    expected = ops.kd_kl(capped(student @ weight.T), other, tau=2.0, mask=mask)
    torch.testing.assert_close(kl(student, weight), expected)
    for ours, theirs in zip(
        torch.autograd.grad(kl(student, weight), (student, weight)),
        torch.autograd.grad(expected, (student, weight)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    assert torch.autograd.gradcheck(lambda h: kl(h, weight.detach(), "none"), student)
    if separate:
        assert torch.autograd.gradcheck(lambda h, w: kl(h, w, "sum"), (student, weight))


def test_kl_gradient_in_place_is_the_same_and_takes_the_logits_memory() -> None:
    leaf, teacher = torch.randn(4, 9, requires_grad=True), torch.randn(4, 9)
    (expected,) = torch.autograd.grad(3 * ops.kd_kl(leaf, teacher, tau=2.0), leaf)
    logits = leaf * 1
    loss = 3 * ops.kd_kl(logits, teacher, tau=2.0, in_place=True)
    (grad,) = torch.autograd.grad(loss, logits)
    assert torch.equal(grad, expected)
    assert grad.data_ptr() == logits.data_ptr()


@pytest.mark.parametrize("in_place", [False, True])
def test_a_kept_kl_graph_gives_its_gradient_again(in_place: bool) -> None:
    leaf, teacher = torch.randn(4, 9, requires_grad=True), torch.randn(4, 9)
    loss = ops.kd_kl(leaf * 1, teacher, in_place=in_place)
    (first,) = torch.autograd.grad(loss, leaf, 5 * torch.ones(()), retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss, leaf, -torch.ones(()))
    assert torch.equal(first, kept)
    torch.testing.assert_close(second, kept / -5)


def test_kl_in_place_leaves_logits_that_need_no_gradient() -> None:
    leaf, teacher = torch.randn(4, 9, requires_grad=True), torch.randn(4, 9)
    logits = leaf.detach().clone()
    with torch.no_grad():
        assert ops.kd_kl(leaf, teacher, in_place=True) == ops.kd_kl(logits, teacher, in_place=True)
    assert torch.equal(logits, leaf)


def test_kl_in_place_of_logits_that_another_op_needs_is_noticed() -> None:
    leaf = torch.randn(4, 9, requires_grad=True)
    logits = leaf.tanh()  # its backward needs its result
    loss = ops.kd_kl(logits, torch.randn(4, 9), in_place=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class _Alias(torch.autograd.Function):
    """The identity, whose result is not known as a view of what it shares its memory with."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


@pytest.mark.parametrize(
    "view",
    [
        lambda p: p,
        lambda p: p[:],
        lambda p: p.reshape(2, 2, 9)[1:],
        lambda p: p.unbind(0)[1].view(1, 9),
        lambda p: p.detach().requires_grad_()[1:],
        _Alias.apply,
    ],
    ids=["itself", "slice", "view of a view", "row", "detached", "undeclared alias"],
)
def test_kl_in_place_refuses_what_shares_a_leaf_s_memory(view: Callable[[Tensor], Tensor]) -> None:
    """A parameter would lose its values. The same views of another op's output are taken."""
    parameter = torch.nn.Parameter(torch.randn(4, 9))
    before = parameter.detach().clone()
    logits = view(parameter)
    with pytest.raises(KernelError, match="kd_kl: in_place on a leaf, or a view of one, would"):
        ops.kd_kl(logits, torch.randn(logits.shape), in_place=True)
    assert torch.equal(parameter, before)
    fine = (parameter * 1).reshape(2, 2, 9)[1:]
    ops.kd_kl(fine, torch.randn(fine.shape), in_place=True).backward()
    assert torch.equal(parameter, before)
    assert parameter.grad is not None


def test_kl_gradient_of_fp16_logits_keeps_what_loss_scaling_saves() -> None:
    """Divided by 1024 rows most of q - p is below fp16; the incoming gradient makes up for it."""
    scale, rows = 2.0**15, 1024
    student, teacher = torch.randn(rows, 2000).half(), torch.randn(rows, 2000).half()
    teacher = (student + 0.05 * teacher).requires_grad_(False)
    exact, leaf = student.double().requires_grad_(), student.clone().requires_grad_()
    (scale * ops.kd_kl(exact, teacher.double())).backward()
    (scale * ops.kd_kl(leaf, teacher)).backward()
    assert exact.grad is not None
    assert leaf.grad is not None
    assert exact.grad.median().abs() / scale < 6e-8  # of fp16's smallest number
    assert (leaf.grad.double() - exact.grad).norm() / exact.grad.norm() < 1e-3


def test_a_row_whose_loss_is_left_out_gets_no_gradient_whatever_it_holds() -> None:
    leaf = torch.randn(3, 9)
    leaf[1] = math.nan
    leaf.requires_grad_()
    rows = ops.kd_kl(leaf, torch.randn(3, 9), reduction="none")
    rows[torch.tensor([0, 2])].sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()
    assert (leaf.grad[1] == 0).all()


@pytest.mark.parametrize("vocabulary", [128_256, 152_064])
def test_kl_at_a_real_vocabulary(vocabulary: int) -> None:
    teacher = torch.randn(2, vocabulary) * 3
    student = (teacher + torch.tensor([[0.01], [1.0]]) * torch.randn(2, vocabulary)).bfloat16()
    student.requires_grad_()
    exact = student.detach().double().requires_grad_()
    rows = ops.kd_kl(student, teacher, tau=2.0, reduction="none")
    truth = ops.kd_kl(exact, teacher.double(), tau=2.0, reduction="none")
    log_p = (teacher.double() / 2).log_softmax(-1)
    textbook = (log_p.exp() * (log_p - (exact / 2).log_softmax(-1))).sum(-1) * 4
    torch.testing.assert_close(truth, textbook, rtol=1e-9, atol=0)
    torch.testing.assert_close(rows.double(), truth, rtol=5e-5, atol=0)
    (grad,) = torch.autograd.grad(rows.sum(), student)
    (wanted,) = torch.autograd.grad(truth.sum(), exact)
    assert ((grad - wanted).norm(dim=-1) / wanted.norm(dim=-1) < 4e-3).all()  # bf16's rounding


def test_linear_kl_does_not_depend_on_the_chunk() -> None:
    student, teacher = torch.randn(37, 16, requires_grad=True), torch.randn(37, 16)
    weight = torch.randn(301, 16)
    results = []
    for chunk_rows in (1, 5, 37, 1024):
        loss = ops.linear_kd_kl(student, teacher, weight, chunk_rows=chunk_rows)
        results.append((loss, *torch.autograd.grad(loss, student)))
    for loss, grad in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=1e-6, atol=0)
        torch.testing.assert_close(grad, results[0][1], rtol=1e-5, atol=1e-6)


def test_kl_of_nothing_is_zero() -> None:
    """No rows, or every row masked: 0 with zero gradients, not NaN."""
    weight = torch.randn(9, 4)
    for rows, mask in ((0, None), (3, torch.zeros(3, dtype=torch.bool))):
        hidden = torch.randn(rows, 4, requires_grad=True)
        logits = torch.randn(rows, 9, requires_grad=True)
        for loss, source in (
            (ops.linear_kd_kl(hidden, torch.randn(rows, 4), weight, mask=mask), hidden),
            (ops.kd_kl(logits, torch.randn(rows, 9), mask=mask), logits),
        ):
            assert loss.item() == 0.0
            loss.backward()
            assert torch.equal(source.grad, torch.zeros_like(source))


def test_masked_rows_may_hold_anything() -> None:
    mask = torch.tensor([True, False])
    hidden = torch.tensor([[1.0, 2.0], [math.nan, math.inf]], requires_grad=True)
    loss = ops.linear_kd_kl(hidden, hidden.detach() + 1, torch.randn(5, 2), mask=mask)
    loss.backward()
    assert loss.isfinite()
    assert (hidden.grad[1] == 0).all()
    logits = torch.tensor([[1.0, 2.0, 0.0], [math.nan, math.inf, 0.0]], requires_grad=True)
    loss = ops.kd_kl(logits, torch.randn(2, 3), mask=mask)
    loss.backward()
    assert loss.isfinite()
    assert (logits.grad[1] == 0).all()


# --- registration and compilation -----------------------------------------------------------------


def op_calls() -> dict[str, tuple[Any, ...]]:
    """One call of each registered op."""
    z, student, teacher = torch.randn(2, 50), torch.randn(4, 9), torch.randn(4, 9)
    codes, scales = reference.quantize_pack(z, bits=6, group_size=16)
    x = torch.randn(2, 3, 5)
    named = {name: t.detach() for name, t in adapter_parameters(5, 8, torch.float32).items()}
    parameters = reference.ProjectionParameters(**named)
    settings = reference.ProjectionSettings(0.5, "example", 1, True)
    grouped = parameters._replace(gain=torch.rand(4)), settings._replace(groups=4)
    _, squares = reference.project_calibrate(x, parameters, settings)
    _, group_squares = reference.project_calibrate(x, *grouped)
    needs = [True, False, True, True, False, True, True, True]
    hidden, mask = (torch.randn(4, 5), torch.randn(4, 5)), torch.rand(4) > 0.3
    return {
        "quantize_pack": (z, 6, 16, False),
        "unpack_dequantize": (codes, scales, 6, 16, 50, torch.bfloat16),
        "fake_quantize": (z, 4, 32, True),
        "project_calibrate": (x, *parameters, *settings),
        "project_calibrate, groups": (x, *grouped[0], *grouped[1]),
        "project_calibrate_backward": (
            *(torch.randn(2, 3, 8), x, squares, needs),
            *(*parameters, *settings),
        ),
        "project_calibrate_backward, groups": (
            *(torch.randn(2, 3, 8), x, group_squares, needs),
            *(*grouped[0], *grouped[1]),
        ),
        "kd_kl": (student, teacher, mask, torch.tensor(0.5), 2.0),
        "kd_kl_in_place": (student, teacher, mask, torch.tensor(0.5), 2.0),
        "scale_rows": (student, torch.rand(4)),
        "linear_losses": (
            *(hidden[0], torch.tensor([1, -1, 7, 0]), None, hidden[1], mask),
            *(torch.randn(9, 5), torch.randn(9), None, None),
            *(2.0, 0.5, 3.0, 0.1, 8, 3, True, True, True, True, True, None),
        ),
    }


@pytest.mark.parametrize("name", op_calls())
def test_opcheck(name: str) -> None:
    op = getattr(torch.ops.latentwire_fast, name.split(",")[0]).default
    torch.library.opcheck(op, op_calls()[name])


@pytest.mark.parametrize(
    "kind",
    [
        *("fake_quantize", "project", "project groups"),
        *("kd_kl", "kd_kl scaled", "kd_kl in place", "linear_kd_kl", "linear_cross_entropy_kd"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_fullgraph_compile_equals_eager(kind: str) -> None:
    parameters = {
        k: v.detach().requires_grad_() for k, v in adapter_parameters(20, 7, torch.float32).items()
    }
    mask = torch.tensor([[True, True, False], [True, True, True]])
    teacher, head = torch.randn(2, 3, 20), torch.randn(9, 20, requires_grad=True)
    targets, gains = torch.rand(7) + 0.1, torch.rand(7, requires_grad=True)
    calls: dict[str, Callable[[Tensor], Tensor]] = {
        "fake_quantize": lambda x: ops.fake_quantize(x, bits=4, group_size=32).square().sum(),
        "project": lambda x: ops.project_calibrate(x, **parameters, target_rms=0.1).square().sum(),
        "project groups": lambda x: (
            ops.project_calibrate(
                *(x, parameters["weight"], parameters["bias"]),
                target_rms=targets,
                gain=gains,
                calibration="example",
                groups=7,
            )
            .square()
            .sum()
        ),
        "kd_kl": lambda x: ops.kd_kl(x, teacher, tau=2.0, mask=mask),
        "kd_kl scaled": lambda x: 3 * ops.kd_kl(x, teacher, tau=2.0, mask=mask),
        "kd_kl in place": lambda x: ops.kd_kl(x * 1, teacher, tau=2.0, mask=mask, in_place=True),
        "linear_kd_kl": lambda x: ops.linear_kd_kl(x, teacher, head, tau=2.0, mask=mask),
        "linear_cross_entropy_kd": lambda x: sum(
            ops.linear_cross_entropy_kd(x, mask.long(), head, teacher_hidden=teacher)[:2]
        ),
    }
    call = calls[kind]
    x = torch.randn(2, 3, 20, requires_grad=True)
    eager = call(x)
    (eager_grad,) = torch.autograd.grad(eager, x)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(x)
    (grad,) = torch.autograd.grad(compiled, x)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(grad, eager_grad)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_fullgraph_compile_of_packing_and_unpacking() -> None:
    code = {"bits": 6, "group_size": 16}

    def call(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes, scales = ops.quantize_pack(z, **code)
        return codes, scales, ops.unpack_dequantize(codes, scales, **code, shape=(2, 3, 7))

    z = torch.randn(2, 3, 7)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(z), call(z), strict=True):
        assert torch.equal(found, expected)


# --- arguments ------------------------------------------------------------------------------------

LATENT = torch.zeros(2, 3, 8)
BAD_CALLS: dict[str, tuple[type[LatentWireError], str, Callable[[], object]]] = {
    "bits of another type": (
        ConfigError,
        r"quantize_pack: bits is 4\.0; expected one of",
        lambda: ops.quantize_pack(LATENT, bits=4.0, group_size=32),
    ),
    "no tensor": (
        KernelError,
        "quantize_pack: z is a list; expected a tensor",
        lambda: ops.quantize_pack([1.0], bits=4, group_size=32),
    ),
    "chunk_rows of another type": (
        ConfigError,
        r"linear_kd_kl: chunk_rows is 1\.5; expected an integer",
        lambda: ops.linear_kd_kl(*torch.zeros(2, 3, 4), torch.zeros(5, 4), chunk_rows=1.5),
    ),
    "gain that is no number": (
        ConfigError,
        "project_calibrate: gain is nan",
        lambda: ops.project_calibrate(
            torch.zeros(2, 4), torch.zeros(3, 4), target_rms=1.0, gain=math.nan
        ),
    ),
    "weight of three dimensions": (
        KernelError,
        r"project_calibrate: weight has shape \(1, 3, 4\); expected two dimensions",
        lambda: ops.project_calibrate(torch.zeros(2, 4), torch.zeros(1, 3, 4), target_rms=1.0),
    ),
    "bits": (
        ConfigError,
        "quantize_pack: bits is 5; expected one of",
        lambda: ops.quantize_pack(LATENT, bits=5, group_size=32),
    ),
    "group": (
        ConfigError,
        "fake_quantize: group_size is 48",
        lambda: ops.fake_quantize(LATENT, bits=4, group_size=48),
    ),
    "one dimension": (
        KernelError,
        r"quantize_pack: z has shape \(4,\)",
        lambda: ops.quantize_pack(torch.zeros(4), bits=4, group_size=16),
    ),
    "integers": (
        KernelError,
        "fake_quantize: z is torch.int64",
        lambda: ops.fake_quantize(torch.zeros(2, 4, dtype=torch.int64), bits=4, group_size=16),
    ),
    "codes do not fit": (
        KernelError,
        r"unpack_dequantize: codes has shape \(7,\); expected \(8,\)",
        lambda: ops.unpack_dequantize(
            torch.zeros(7, dtype=torch.uint8),
            torch.zeros(1, dtype=torch.float16),
            bits=4,
            group_size=16,
            shape=(2, 8),
        ),
    ),
    "scales do not fit": (
        KernelError,
        r"unpack_dequantize: scales has shape \(2,\); expected \(1,\)",
        lambda: ops.unpack_dequantize(
            torch.zeros(8, dtype=torch.uint8),
            torch.zeros(2, dtype=torch.float16),
            bits=4,
            group_size=16,
            shape=(2, 8),
        ),
    ),
    "shape to unpack": (
        KernelError,
        r"unpack_dequantize: shape is \(16,\); expected whole numbers \(..., M, d\)",
        lambda: ops.unpack_dequantize(
            torch.zeros(8, dtype=torch.uint8),
            torch.zeros(1, dtype=torch.float16),
            bits=4,
            group_size=16,
            shape=(16,),
        ),
    ),
    "scales in fp32": (
        KernelError,
        "unpack_dequantize: codes, scales and result are torch.uint8, torch.float32",
        lambda: ops.unpack_dequantize(
            torch.zeros(8, dtype=torch.uint8), torch.zeros(1), bits=4, group_size=16, shape=(2, 8)
        ),
    ),
    "calibration": (
        ConfigError,
        "project_calibrate: calibration is 'row'",
        lambda: ops.project_calibrate(LATENT, torch.zeros(4, 8), calibration="row"),
    ),
    "no target": (
        ConfigError,
        "project_calibrate: target_rms is None",
        lambda: ops.project_calibrate(LATENT, torch.zeros(4, 8)),
    ),
    "weight": (
        KernelError,
        r"project_calibrate: weight has shape \(4, 9\); expected \(4, 8\)",
        lambda: ops.project_calibrate(LATENT, torch.zeros(4, 9), target_rms=1.0),
    ),
    "gamma": (
        KernelError,
        r"project_calibrate: gamma has shape \(8,\); expected \(4,\)",
        lambda: ops.project_calibrate(
            LATENT, torch.zeros(4, 8), gamma=torch.zeros(8), target_rms=1.0
        ),
    ),
    "gain": (
        KernelError,
        r"project_calibrate: gain has shape \(2,\); expected one element$",
        lambda: ops.project_calibrate(
            LATENT, torch.zeros(4, 8), gain=torch.ones(2), target_rms=1.0
        ),
    ),
    "tau": (
        ConfigError,
        "kd_kl: tau is 0.0; expected a positive number",
        lambda: ops.kd_kl(LATENT, LATENT, tau=0.0),
    ),
    "negative tau": (
        ConfigError,
        "linear_kd_kl: tau is -1.0; expected a positive number",
        lambda: ops.linear_kd_kl(LATENT, LATENT, torch.zeros(5, 8), tau=-1.0),
    ),
    "tau as text": (
        ConfigError,
        "kd_kl: tau is '2'; expected a positive number",
        lambda: ops.kd_kl(LATENT, LATENT, tau="2"),  # type: ignore[arg-type]
    ),
    "tau as a truth": (
        ConfigError,
        "kd_kl: tau is True; expected a positive number",
        lambda: ops.kd_kl(LATENT, LATENT, tau=True),
    ),
    "tau as a tensor": (
        ConfigError,
        r"linear_kd_kl: tau is tensor\(2\.\); expected a positive number",
        lambda: ops.linear_kd_kl(LATENT, LATENT, torch.zeros(5, 8), tau=torch.tensor(2.0)),
    ),
    "softcap as text": (
        ConfigError,
        "linear_kd_kl: softcap is '30'; expected a positive number, or None",
        lambda: ops.linear_kd_kl(LATENT, LATENT, torch.zeros(5, 8), softcap="30"),
    ),
    "target as text": (
        ConfigError,
        "project_calibrate: target_rms is '1'; calibration 'token' needs a positive number",
        lambda: ops.project_calibrate(LATENT, torch.zeros(4, 8), target_rms="1"),
    ),
    "gain as text": (
        ConfigError,
        "project_calibrate: gain is '1'; expected a finite number, or a tensor",
        lambda: ops.project_calibrate(LATENT, torch.zeros(4, 8), target_rms=1.0, gain="1"),
    ),
    "mask as a list": (
        KernelError,
        "kd_kl: mask is a list; expected a tensor",
        lambda: ops.kd_kl(LATENT, LATENT, mask=[True]),
    ),
    "codes as bytes": (
        KernelError,
        "unpack_dequantize: codes is a bytes; expected a tensor",
        lambda: ops.unpack_dequantize(
            b"", torch.zeros(1, dtype=torch.float16), bits=4, group_size=16, shape=(2, 8)
        ),
    ),
    "shape as text": (
        KernelError,
        r"unpack_dequantize: shape is \('2', 8\); expected whole numbers \(..., M, d\)",
        lambda: ops.unpack_dequantize(
            torch.zeros(8, dtype=torch.uint8),
            torch.zeros(1, dtype=torch.float16),
            bits=4,
            group_size=16,
            shape=("2", 8),
        ),
    ),
    "tau without a value": (
        ConfigError,
        "kd_kl: tau is nan; expected a positive number",
        lambda: ops.kd_kl(LATENT, LATENT, tau=math.nan),
    ),
    "integer logits": (
        KernelError,
        "kd_kl: teacher_logits is torch.int64; expected a floating-point tensor",
        lambda: ops.kd_kl(LATENT, LATENT.long()),
    ),
    "no vocabulary": (
        KernelError,
        r"kd_kl: student_logits has shape \(2, 0\); expected at least one token",
        lambda: ops.kd_kl(torch.zeros(2, 0), torch.zeros(2, 0)),
    ),
    "in place on a leaf": (
        KernelError,
        "kd_kl: in_place on a leaf, or a view of one, would overwrite it",
        lambda: ops.kd_kl(torch.zeros(2, 8, requires_grad=True), torch.zeros(2, 8), in_place=True),
    ),
    "in place on strided logits": (
        KernelError,
        r"kd_kl: in_place on student_logits with strides \(1, 2\); expected contiguous",
        lambda: ops.kd_kl(
            (torch.zeros(8, 2, requires_grad=True) * 1).T, torch.zeros(2, 8), in_place=True
        ),
    ),
    "vocabulary": (
        KernelError,
        r"kd_kl: teacher_logits has shape \(2, 3, 9\); expected \(2, 3, 8\)",
        lambda: ops.kd_kl(LATENT, torch.zeros(2, 3, 9)),
    ),
    "mask": (
        KernelError,
        r"kd_kl: mask has shape \(3,\); expected \(2, 3\)",
        lambda: ops.kd_kl(LATENT, LATENT, mask=torch.ones(3, dtype=torch.bool)),
    ),
    "mask of numbers": (
        KernelError,
        "linear_kd_kl: mask is torch.float32; expected torch.bool",
        lambda: ops.linear_kd_kl(LATENT, LATENT, torch.zeros(5, 8), mask=torch.ones(2, 3)),
    ),
    "reduction": (
        ConfigError,
        "linear_kd_kl: reduction is 'batchmean'",
        lambda: ops.linear_kd_kl(LATENT, LATENT, torch.zeros(5, 8), reduction="batchmean"),
    ),
    "head": (
        KernelError,
        r"linear_kd_kl: weight has shape \(5, 4\); expected \(5, 8\)",
        lambda: ops.linear_kd_kl(LATENT, LATENT, torch.zeros(5, 4)),
    ),
    "head without tokens": (
        KernelError,
        r"linear_kd_kl: weight has shape \(0, 8\); expected at least one token",
        lambda: ops.linear_kd_kl(LATENT, LATENT, torch.zeros(0, 8)),
    ),
    "head in fp64": (
        KernelError,
        "linear_kd_kl: student_hidden is torch.float32 and weight torch.float64; expected both",
        lambda: ops.linear_kd_kl(LATENT, LATENT, torch.zeros(5, 8).double()),
    ),
    "teacher's width": (
        KernelError,
        r"linear_kd_kl: teacher_hidden has shape \(2, 3, 9\); expected \(2, 3, 8\)",
        lambda: ops.linear_kd_kl(LATENT, torch.zeros(2, 3, 9), torch.zeros(5, 8)),
    ),
    "teacher's head": (
        KernelError,
        r"linear_kd_kl: teacher_weight has shape \(6, 8\); expected \(6, 9\)",
        lambda: ops.linear_kd_kl(
            LATENT, torch.zeros(2, 3, 9), torch.zeros(5, 8), teacher_weight=torch.zeros(6, 8)
        ),
    ),
    "another device": (
        KernelError,
        "linear_kd_kl: weight is on meta; expected cpu, like the input",
        lambda: ops.linear_kd_kl(LATENT, LATENT, torch.zeros(5, 8, device="meta")),
    ),
    "softcap": (
        ConfigError,
        "linear_kd_kl: softcap is 0.0; expected a positive number, or None",
        lambda: ops.linear_kd_kl(LATENT, LATENT, torch.zeros(5, 8), softcap=0.0),
    ),
    "smaller teacher": (
        KernelError,
        "linear_kd_kl: teacher_weight has 4 rows",
        lambda: ops.linear_kd_kl(
            LATENT, LATENT, torch.zeros(5, 8), teacher_weight=torch.zeros(4, 8)
        ),
    ),
    "rows with a trained head": (
        ConfigError,
        "linear_kd_kl: reduction 'none' cannot give the head's gradient",
        lambda: ops.linear_kd_kl(
            LATENT, LATENT, torch.zeros(5, 8, requires_grad=True), reduction="none"
        ),
    ),
    "chunk": (
        ConfigError,
        "linear_kd_kl: chunk_rows is 0",
        lambda: ops.linear_kd_kl(LATENT, LATENT, torch.zeros(5, 8), chunk_rows=0),
    ),
    "backend": (ConfigError, "backend: name is 'cuda'", lambda: ops.backend("cuda").__enter__()),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_arguments_say_what_was_expected(name: str) -> None:
    """And nothing is written."""
    error, message, call = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        call()
    assert (LATENT == 0).all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_triton_without_a_gpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(KernelError, match="needs a CUDA device"), ops.backend("triton"):
        pass
    with ops.backend("reference"):
        ops.fake_quantize(LATENT, bits=4, group_size=16)


def test_an_op_runs_on_the_device_of_its_first_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current GPU, whichever the tensors are on."""
    inside: list[Tensor] = []

    @contextmanager
    def device_of(x: Tensor) -> Iterator[None]:
        inside.append(x)
        yield
        inside.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    run = dispatch._on_its_device(lambda x, factor: (inside[0] is x, x * factor), "cuda")
    x = torch.ones(2)
    found, product = run(x, 3)
    assert found
    assert torch.equal(product, 3 * x)
    assert not inside


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_ops_work_on_a_gpu_that_is_not_the_current_one() -> None:
    x, weight = torch.randn(5, 32), torch.randn(64, 32)
    found = ops.project_calibrate(x.to("cuda:1"), weight.to("cuda:1"), target_rms=0.5)
    expected = ops.project_calibrate(x, weight, target_rms=0.5)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5)


# --- memory ---------------------------------------------------------------------------------------

PEAK_MEMORY = r"""
import re
from pathlib import Path
import torch
from latentwire_fast import ops

torch.manual_seed(0)
student = torch.randn(384, 64, requires_grad=True)
teacher, weight = torch.randn(384, 64), torch.randn(128256, 64).mul_(64**-0.5)

def ours(rows, tokens=128256):
    head = weight[:tokens]
    return ops.linear_kd_kl(student[:rows], teacher[:rows], head, tau=2.0, chunk_rows=4)

def naive(rows):
    log_q = torch.log_softmax(student[:rows] @ weight.T / 2, -1)
    log_p = torch.log_softmax(teacher[:rows] @ weight.T / 2, -1)
    return torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * 4

def mib(field):
    status = Path("/proc/self/status").read_text()
    return int(re.search(field + r":\s+(\d+) kB", status)[1]) / 1024

ours(4, 10000).backward()  # what libraries set up once is none of the rows'
before = mib("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak is what is there now
for form, rows in ((ours, 64), (ours, 384), (naive, 384)):  # it does not fall again: least first
    student.grad = None
    loss = form(rows)
    loss.backward()
    print(mib("VmHWM") - before, loss.item(), student.grad.norm().item())
"""


@pytest.mark.slow
def test_linear_kl_memory_is_bounded_by_the_chunk() -> None:
    """N = 64 and 384, V = 128,256, d = 64, fp32, forward and backward, beside the naive form."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK_MEMORY], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = [[float(number) for number in line.split()] for line in done.stdout.splitlines()]
    (few, *_), (ours, loss, grad), (naive, naive_loss, naive_grad) = lines
    logger.info("MiB: 64 rows %.0f, 384 rows %.0f, naive at 384 %.0f", few, ours, naive)
    assert loss == pytest.approx(naive_loss, rel=1e-4)
    assert grad == pytest.approx(naive_grad, rel=1e-4)
    # A chunk and its temporaries are about 20 MiB, the rest is the allocator's; one [384, V] in
    # fp32 would be 188.
    assert ours < 100
    assert ours < few + 50
    assert ours < naive / 10
