"""The public ops: quantisation, calibrated projection and distillation KL, with their gradients.

Each is a `torch.library` op whose CPU implementation is `reference` and whose CUDA implementation
is a Triton launcher (imported on first use), wrapped in an `autograd.Function`.
`torch.compile(fullgraph=True)` traces through all of them.

    codes, scales = ops.quantize_pack(latent, bits=4, group_size=32)
    with ops.backend("reference"):  # plain torch also on CUDA
        loss = ops.linear_kd_kl(student_hidden, teacher_hidden, lm_head.weight, tau=2.0, mask=mask)
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from latentwire_fast import reference
from latentwire_fast.errors import ConfigError, KernelError, PayloadError

Backend = Literal["auto", "reference", "triton"]
Reduction = Literal["mean", "sum", "none"]
BITS = (8, 6, 4)
GROUP_SIZES = (16, 32, 64)
CALIBRATIONS = ("none", "token", "example", "batch")
REDUCTIONS = ("mean", "sum", "none")
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

_backend: Backend = "auto"
_library = torch.library.Library("latentwire_fast", "DEF")


@contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Choose the implementation of every op inside the block, for the whole process.

    `auto` is Triton on CUDA tensors and the reference on CPU; `reference` and `triton` force one.
    With `TRITON_INTERPRET=1` in the environment, `triton` runs the kernels interpreted on CPU
    tensors.

    Raises:
        ConfigError: an unknown name.
        KernelError: `triton` without a GPU; inside the block, `triton` on a CPU tensor.
    """
    global _backend
    _one_of("backend", "name", name, ("auto", "reference", "triton"))
    if name == "triton" and not (torch.cuda.is_available() or _interpreted()):
        raise KernelError(
            "backend('triton') needs a CUDA device and torch sees none; use 'auto' or 'reference', "
            "or set TRITON_INTERPRET=1 before starting Python to run the kernels interpreted (slow)"
        )
    previous, _backend = _backend, name
    try:
        yield
    finally:
        _backend = previous


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _uses_triton(op: str, x: Tensor) -> bool:
    """Whether this call goes to the Triton kernel; the reference otherwise."""
    if _backend == "triton" and not x.is_cuda and not _interpreted():
        raise KernelError(
            f"{op}: backend 'triton' on a tensor on {x.device}; move it to a CUDA device"
        )
    return _backend == "triton" or (_backend == "auto" and x.is_cuda)


def _register(schema: str, implementation: Any, fake: Any) -> None:
    """Define an op with one Python implementation for CPU and CUDA, and its shape function."""
    name = schema[: schema.index("(")]
    _library.define(schema)
    for key in ("CPU", "CUDA"):
        _library.impl(name, implementation, key)
    torch.library.register_fake(f"latentwire_fast::{name}", fake, lib=_library)


def _one_of(op: str, argument: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{op}: {argument} is {value!r}; expected one of {allowed}")


def _check_float(op: str, argument: str, x: Tensor, *, dims: int) -> None:
    if x.dtype not in FLOATS:
        raise KernelError(f"{op}: {argument} is {x.dtype}; expected a floating-point tensor")
    if x.dim() < dims:
        raise KernelError(
            f"{op}: {argument} has shape {tuple(x.shape)}; expected at least {dims} dimensions"
        )


def _check_shape(
    op: str, argument: str, x: Tensor | None, shape: tuple[int, ...], on: Tensor
) -> None:
    if x is not None and tuple(x.shape) != shape:
        raise KernelError(f"{op}: {argument} has shape {tuple(x.shape)}; expected {shape}")
    if x is not None and x.device != on.device:
        raise KernelError(
            f"{op}: {argument} is on {x.device}; expected {on.device}, like the input"
        )


# --- K1: group quantisation -----------------------------------------------------------------------


def _check_code(op: str, bits: int, group_size: int) -> None:
    _one_of(op, "bits", bits, BITS)
    _one_of(op, "group_size", group_size, GROUP_SIZES)


def _flattened(op: str, z: Tensor) -> Tensor:
    """`[..., M, d]` to `[B, M*d]`."""
    _check_float(op, "z", z, dims=2)
    return z.reshape(math.prod(z.shape[:-2]), z.shape[-2] * z.shape[-1])


def _quantize_pack(z: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    codes, scales = reference.quantize_pack(z, bits=bits, group_size=group_size)
    # Either implementation marks a group with NaN or Inf by the scale NaN; amax passes NaN on.
    if scales.numel() and not math.isfinite(scales.amax().item()):
        raise PayloadError(
            "quantize_pack: z holds NaN or Inf; expected finite values (a payload has no others)"
        )
    return codes, scales


def _quantize_pack_fake(z: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    length = reference.code_bytes(z.shape[1], bits=bits, group_size=group_size)
    groups = -(-z.shape[1] // group_size)
    codes = z.new_empty((z.shape[0], length), dtype=torch.uint8)
    return codes, z.new_empty((z.shape[0], groups), dtype=torch.float16)


def _unpack_dequantize(
    codes: Tensor, scales: Tensor, bits: int, group_size: int, values: int, dtype: torch.dtype
) -> Tensor:
    return reference.unpack_dequantize(
        codes, scales, bits=bits, group_size=group_size, values=values, dtype=dtype
    )


def _unpack_dequantize_fake(
    codes: Tensor, scales: Tensor, bits: int, group_size: int, values: int, dtype: torch.dtype
) -> Tensor:
    return codes.new_empty((codes.shape[0], values), dtype=dtype)


def _fake_quantize(z: Tensor, bits: int, group_size: int) -> Tensor:
    return reference.fake_quantize(z, bits=bits, group_size=group_size)


_register(
    "quantize_pack(Tensor z, int bits, int group_size) -> (Tensor, Tensor)",
    _quantize_pack,
    _quantize_pack_fake,
)
_register(
    "unpack_dequantize(Tensor codes, Tensor scales, int bits, int group_size, SymInt values, "
    "ScalarType dtype) -> Tensor",
    _unpack_dequantize,
    _unpack_dequantize_fake,
)
_register(
    "fake_quantize(Tensor z, int bits, int group_size) -> Tensor",
    _fake_quantize,
    lambda z, bits, group_size: torch.empty_like(z, memory_format=torch.contiguous_format),
)


class _FakeQuantize(torch.autograd.Function):
    """Straight-through: symmetric amax scales never clip, so the gradient is the identity."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, bits: int, group_size: int) -> Tensor:
        return torch.ops.latentwire_fast.fake_quantize(z, bits, group_size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


def quantize_pack(z: Tensor, *, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Quantise the last two dimensions, flattened, in groups; pack the codes into bytes.

    The byte layout is `reference.code_bytes`'s, the formula `reference.quantize`'s. The result is
    the same, bit for bit, on every device. No gradient.

    Args:
        z: `[..., M, d]`, floating point, finite.
        bits: 8, 6 or 4.
        group_size: 16, 32 or 64 consecutive values share a scale; the last group may be short.

    Returns:
        `(codes [..., code_bytes(M*d)] uint8, scales [..., ceil(M*d / group_size)] fp16)`.

    Raises:
        ConfigError: bits or group size; KernelError: shape or dtype; PayloadError: z holds NaN or
        Inf.
    """
    _check_code("quantize_pack", bits, group_size)
    flat = _flattened("quantize_pack", z.detach())
    codes, scales = torch.ops.latentwire_fast.quantize_pack(flat, bits, group_size)
    lead = z.shape[:-2]
    return codes.reshape(*lead, codes.shape[1]), scales.reshape(*lead, scales.shape[1])


def unpack_dequantize(
    codes: Tensor,
    scales: Tensor,
    *,
    bits: int,
    group_size: int,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Unpack what `quantize_pack` packed, and multiply by the scales (in fp32).

    Args:
        codes: `[..., code_bytes(M*d)]` uint8.
        scales: `[..., ceil(M*d / group_size)]` fp16.
        shape: of the result, `(..., M, d)`.
        dtype: of the result.

    Raises:
        ConfigError: bits or group size; KernelError: sizes or dtypes that do not fit `shape`.
    """
    op = "unpack_dequantize"
    _check_code(op, bits, group_size)
    if len(shape) < 2 or min(shape) < 0:
        raise KernelError(f"{op}: shape is {tuple(shape)}; expected (..., M, d)")
    if codes.dtype != torch.uint8 or scales.dtype != torch.float16 or dtype not in FLOATS:
        raise KernelError(
            f"{op}: codes, scales and result are {codes.dtype}, {scales.dtype} and {dtype}; "
            "expected torch.uint8, torch.float16 and a floating-point dtype"
        )
    lead, values = tuple(shape[:-2]), shape[-2] * shape[-1]
    length = reference.code_bytes(values, bits=bits, group_size=group_size)
    groups = -(-values // group_size)
    _check_shape(op, "codes", codes, (*lead, length), codes)
    _check_shape(op, "scales", scales, (*lead, groups), codes)
    batch = math.prod(lead)
    z = torch.ops.latentwire_fast.unpack_dequantize(
        codes.reshape(batch, length),
        scales.reshape(batch, groups),
        bits,
        group_size,
        values,
        dtype,
    )
    return z.reshape(shape)


def fake_quantize(z: Tensor, *, bits: int, group_size: int) -> Tensor:
    """What a payload's receiver would get for z, in z's shape and dtype; straight-through gradient.

    A group that holds NaN or Inf comes out as NaN: training's guard on the loss sees it.

    Raises:
        ConfigError: bits or group size; KernelError: shape or dtype.
    """
    _check_code("fake_quantize", bits, group_size)
    flat = _flattened("fake_quantize", z)
    return _FakeQuantize.apply(flat, bits, group_size).reshape(z.shape)


# --- K2: projection and RMS calibration -----------------------------------------------------------

_AFFINE = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, Tensor? gamma, "
)


def _project_calibrate(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return reference.project_calibrate(x, *arguments)


def _project_calibrate_fake(x: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    calibration = arguments[-2]
    shared = {"none": (0,), "token": (*x.shape[:-1], 1), "batch": (1,) * x.dim()}
    shape = shared.get(calibration) or (*x.shape[:-2], 1, 1)
    out = x.new_empty((*x.shape[:-1], weight.shape[0]))
    return out, x.new_empty(shape, dtype=reference.compute_dtype(x))


def _project_calibrate_backward(grad: Tensor, x: Tensor, *arguments: Any) -> list[Tensor]:
    needs = arguments[-1]
    grads = reference.project_calibrate_backward(grad, x, *arguments)
    return [g for g, needed in zip(grads, needs, strict=True) if needed and g is not None]


def _project_calibrate_backward_fake(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    gamma: Tensor | None,
    gain: Tensor | None,
    *arguments: Any,
) -> list[Tensor]:
    width, c = weight.shape[0], reference.compute_dtype(x)
    shapes = (
        x.shape,
        weight.shape,
        (width,),
        (x.shape[-1],),
        (x.shape[-1],),
        (width,),
        (width,),
        (),
    )
    needs = arguments[-1]
    return [x.new_empty(s, dtype=c) for s, needed in zip(shapes, needs, strict=True) if needed]


_register(
    f"project_calibrate({_AFFINE}Tensor? beta, Tensor? gain, float target_rms, str calibration, "
    "bool tanh) -> (Tensor, Tensor)",
    _project_calibrate,
    _project_calibrate_fake,
)
_register(
    f"project_calibrate_backward(Tensor grad, {_AFFINE}Tensor? gain, Tensor mean_square, "
    "float target_rms, str calibration, bool tanh, bool[8] needs) -> Tensor[]",
    _project_calibrate_backward,
    _project_calibrate_backward_fake,
)


class _ProjectCalibrate(torch.autograd.Function):
    """Saves x, the mean squares and the parameters; y is made again, or not needed, in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        gain: Tensor | None,
        target_rms: float,
        calibration: str,
        tanh: bool,
    ) -> Tensor:
        parameters = (weight, bias, norm_weight, norm_bias, gamma)
        out, mean_square = torch.ops.latentwire_fast.project_calibrate(
            x, *parameters, beta, gain, target_rms, calibration, tanh
        )
        ctx.save_for_backward(x, *parameters, gain, mean_square)
        ctx.settings = (target_rms, calibration, tanh)
        ctx.beta_dtype = None if beta is None else beta.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, norm_weight, norm_bias, gamma, gain, _ = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:8])
        found = iter(
            torch.ops.latentwire_fast.project_calibrate_backward(
                grad.contiguous(), *ctx.saved_tensors, *ctx.settings, needs
            )
        )
        inputs = (x, weight, bias, norm_weight, norm_bias, gamma)
        dtypes = (*(None if t is None else t.dtype for t in inputs), ctx.beta_dtype)
        dtypes = (*dtypes, None if gain is None else gain.dtype)
        grads = [
            next(found).to(dtype) if needed else None
            for needed, dtype in zip(needs, dtypes, strict=True)
        ]
        return (*grads, None, None, None)


def project_calibrate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    target_rms: float | None = None,
    gain: float | Tensor = 1.0,
    calibration: str = "token",
    tanh: bool = False,
) -> Tensor:
    """`gamma * s * y + beta` with `y = W norm(x) + b`, and s such that `s * y` has a given RMS.

    The adapter's last stage: a projection into a reader's input space, brought to the root mean
    square of its own embeddings. Differentiable (once) in every tensor argument.

    Args:
        x: `[..., d]`, or `[..., M, d]` for calibration per example.
        weight: `[D, d]`; bias: `[D]`.
        norm_weight: `[d]`: LayerNorm of x first, with `norm_bias` `[d]` if given.
        gamma: `[D]`, per-channel factor after the calibration; beta: `[D]`, offset.
        target_rms: the RMS to reach; needed unless `calibration` is `none`, which ignores it.
        gain: multiplies s (with calibration `none`, it is s); a number, or a tensor of one element.
        calibration: which values share one RMS: a `token`'s D, an `example`'s M*D, the whole
            `batch`'s; `none` leaves y as it is.
        tanh: y is the tanh of the projection.

    Returns:
        `[..., D]` in x's dtype.

    Raises:
        ConfigError: an unknown calibration, or no positive target_rms for it.
        KernelError: shapes, dtypes or devices that do not fit.
    """
    op = "project_calibrate"
    _one_of(op, "calibration", calibration, CALIBRATIONS)
    if calibration != "none" and not (target_rms is not None and 0 < target_rms < math.inf):
        raise ConfigError(
            f"{op}: target_rms is {target_rms}; calibration {calibration!r} needs a positive number"
        )
    _check_float(op, "x", x, dims=2 if calibration == "example" else 1)
    _check_float(op, "weight", weight, dims=2)
    width, inner = weight.shape[0], x.shape[-1]
    if norm_bias is not None and norm_weight is None:
        raise KernelError(f"{op}: norm_bias without norm_weight; give both, or norm_weight alone")
    shapes = {
        "weight": (weight, (width, inner)),
        "bias": (bias, (width,)),
        "norm_weight": (norm_weight, (inner,)),
        "norm_bias": (norm_bias, (inner,)),
        "gamma": (gamma, (width,)),
        "beta": (beta, (width,)),
    }
    for name, (tensor, shape) in shapes.items():
        _check_shape(op, name, tensor, shape, x)
    scale = 1.0 if calibration == "none" or target_rms is None else float(target_rms)
    gain_tensor: Tensor | None = None
    if isinstance(gain, Tensor):
        if gain.numel() != 1:
            raise KernelError(f"{op}: gain has shape {tuple(gain.shape)}; expected one element")
        gain_tensor = gain.reshape(())
    else:
        scale *= float(gain)
    return _ProjectCalibrate.apply(
        x,
        weight,
        bias,
        norm_weight,
        norm_bias,
        gamma,
        beta,
        gain_tensor,
        scale,
        calibration,
        tanh,
    )


# --- K3: distillation KL --------------------------------------------------------------------------


def _check_distillation(
    op: str, tau: float, mask: Tensor | None, rows: Tensor, reduction: str
) -> None:
    if not 0 < tau < math.inf:
        raise ConfigError(f"{op}: tau is {tau}; expected a positive number")
    _one_of(op, "reduction", reduction, REDUCTIONS)
    if mask is not None and mask.dtype != torch.bool:
        raise KernelError(
            f"{op}: mask is {mask.dtype}; expected torch.bool, True for rows to count"
        )
    _check_shape(op, "mask", mask, tuple(rows.shape[:-1]), rows)


def _count(mask: Tensor | None, rows: int) -> Tensor | int:
    """Rows that count, at least 1: without any the mean is 0, and no host synchronisation finds out."""
    return max(rows, 1) if mask is None else mask.sum().clamp(min=1)


def _kd_kl(student: Tensor, teacher: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    return reference.kd_kl(student, teacher, tau=tau)


def _kd_kl_fake(student: Tensor, teacher: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    c, n = reference.compute_dtype(student), student.shape[0]
    return student.new_empty(n, dtype=c), student.new_empty((3, n), dtype=c)


def _kd_kl_backward(
    student: Tensor, teacher: Tensor, stats: Tensor, row_grads: Tensor, tau: float
) -> Tensor:
    return reference.kd_kl_backward(student, teacher, stats, row_grads, tau=tau)


_register(
    "kd_kl(Tensor student, Tensor teacher, float tau) -> (Tensor, Tensor)", _kd_kl, _kd_kl_fake
)
_register(
    "kd_kl_backward(Tensor student, Tensor teacher, Tensor stats, Tensor row_grads, float tau) "
    "-> Tensor",
    _kd_kl_backward,
    lambda student, teacher, stats, row_grads, tau: torch.empty_like(
        student, memory_format=torch.contiguous_format
    ),
)


class _KdKl(torch.autograd.Function):
    """Saves the logits that exist anyway and three numbers per row."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, tau: float) -> Tensor:
        losses, stats = torch.ops.latentwire_fast.kd_kl(student, teacher, tau)
        ctx.save_for_backward(student, teacher, stats)
        ctx.tau = tau
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        student, teacher, stats = ctx.saved_tensors
        return (
            torch.ops.latentwire_fast.kd_kl_backward(student, teacher, stats, grad, ctx.tau),
            None,
            None,
        )


def kd_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    tau: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """`tau**2 * KL(softmax(teacher/tau) || softmax(student/tau))`, the distillation loss of Hinton
    et al.

    Accurate from a KL of 1e-7 up, never negative, exactly 0 for identical logits (`reference.kd_kl`
    has the formula). Gradient to the student alone.

    Args:
        student_logits: `[..., V]`. Tokens that it does not have are -inf, and leave both
        distributions.
        teacher_logits: `[..., V]`, of the same vocabulary; -inf is probability 0.
        tau: temperature.
        mask: `[...]` bool, True where a row counts.
        reduction: `mean` over the rows that count (0 without any), their `sum`, or `none`: `[...]`.

    Returns:
        The loss in fp32 (fp64 for fp64 logits).

    Raises:
        ConfigError: tau or reduction; KernelError: shapes or dtypes that do not fit.
    """
    op = "kd_kl"
    _check_float(op, "student_logits", student_logits, dims=1)
    _check_float(op, "teacher_logits", teacher_logits, dims=1)
    _check_shape(op, "teacher_logits", teacher_logits, tuple(student_logits.shape), student_logits)
    _check_distillation(op, tau, mask, student_logits, reduction)
    *lead, vocabulary = student_logits.shape
    rows = math.prod(lead)
    losses = _KdKl.apply(
        student_logits.reshape(rows, vocabulary),
        teacher_logits.detach().reshape(rows, vocabulary),
        float(tau),
    )
    if mask is not None:
        losses = torch.where(mask.reshape(rows), losses, 0.0)
    if reduction == "none":
        return losses.reshape(lead)
    return losses.sum() if reduction == "sum" else losses.sum() / _count(mask, rows)


def _linear_kd_kl(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    weight: Tensor,
    teacher_weight: Tensor | None,
    mask: Tensor | None,
    tau: float,
    softcap: float,
    chunk_rows: int,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return reference.linear_kd_kl(
        student_hidden,
        teacher_hidden,
        weight,
        teacher_weight,
        mask,
        tau=tau,
        softcap=softcap,
        chunk_rows=chunk_rows,
        needs_hidden=needs_hidden,
        needs_weight=needs_weight,
    )


def _linear_kd_kl_fake(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    weight: Tensor,
    teacher_weight: Tensor | None,
    mask: Tensor | None,
    tau: float,
    softcap: float,
    chunk_rows: int,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    c, n = reference.compute_dtype(student_hidden), student_hidden.shape[0]
    (vocabulary, width) = weight.shape
    return (
        student_hidden.new_empty(n, dtype=c),
        student_hidden.new_empty((n if needs_hidden else 0, width), dtype=c),
        student_hidden.new_empty((vocabulary if needs_weight else 0, width), dtype=c),
    )


_register(
    "linear_kd_kl(Tensor student_hidden, Tensor teacher_hidden, Tensor weight, "
    "Tensor? teacher_weight, Tensor? mask, float tau, float softcap, int chunk_rows, "
    "bool needs_hidden, bool needs_weight) -> (Tensor, Tensor, Tensor)",
    _linear_kd_kl,
    _linear_kd_kl_fake,
)


class _LinearKdKl(torch.autograd.Function):
    """The gradients are made in the forward call, while a chunk's logits exist; backward scales
    them.

    Returns the sum of the row losses, or with `per_row` the losses `[N]`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        teacher_hidden: Tensor,
        weight: Tensor,
        teacher_weight: Tensor | None,
        mask: Tensor | None,
        settings: tuple[float, float, int, bool, bool],
        per_row: bool,
    ) -> Tensor:
        losses, d_hidden, d_weight = torch.ops.latentwire_fast.linear_kd_kl(
            student_hidden, teacher_hidden, weight, teacher_weight, mask, *settings
        )
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.dtypes = student_hidden.dtype, weight.dtype
        return losses if per_row else losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        hidden = head = None
        if ctx.needs_input_grad[0]:
            hidden = (d_hidden * (grad[:, None] if grad.dim() else grad)).to(hidden_dtype)
        if ctx.needs_input_grad[2]:
            head = (d_weight * grad).to(weight_dtype)
        return hidden, None, head, None, None, None, None


def _check_heads(
    op: str, student: Tensor, teacher: Tensor, weight: Tensor, teacher_weight: Tensor | None
) -> None:
    for name, x in (("student_hidden", student), ("teacher_hidden", teacher), ("weight", weight)):
        _check_float(op, name, x, dims=2 if name == "weight" else 1)
    _check_shape(op, "weight", weight, (weight.shape[0], student.shape[-1]), student)
    if teacher_weight is None:
        _check_shape(op, "teacher_hidden", teacher, tuple(student.shape), student)
        return
    _check_float(op, "teacher_weight", teacher_weight, dims=2)
    _check_shape(
        op, "teacher_hidden", teacher, (*student.shape[:-1], teacher_weight.shape[1]), student
    )
    if teacher_weight.shape[0] < weight.shape[0]:
        raise KernelError(
            f"{op}: teacher_weight has {teacher_weight.shape[0]} rows (tokens); expected at least "
            f"the student's {weight.shape[0]}"
        )


def linear_kd_kl(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    weight: Tensor,
    *,
    teacher_weight: Tensor | None = None,
    tau: float = 1.0,
    mask: Tensor | None = None,
    chunk_rows: int = 1024,
    reduction: Reduction = "mean",
    softcap: float | None = None,
) -> Tensor:
    """`kd_kl` of two models' logits, from the hidden states before their heads: never holds `[N,
    V]`.

    Gradients go to `student_hidden`, and to `weight` if it requires one; they are made in the
    forward call. Memory beyond inputs and gradients is a few times `chunk_rows * V` numbers,
    whatever N.

    Args:
        student_hidden: `[..., d]`; teacher_hidden: `[..., d]`, or `[..., d_t]` with its own head.
        weight: `[V, d]`, the student's head (and the teacher's, without `teacher_weight`).
        teacher_weight: `[V_t, d_t]`, V_t >= V: the first V tokens are the student's, and only they
        count. tau, mask, reduction: as in `kd_kl`.
        chunk_rows: rows whose logits are held at a time.
        softcap: logits are `softcap * tanh(logits / softcap)` first (Gemma 2).

    Returns:
        The loss in fp32 (fp64 for fp64 hidden states).

    Raises:
        ConfigError: tau, reduction, chunk_rows or softcap; reduction `none` with a trained head.
        KernelError: shapes or dtypes that do not fit.
    """
    op = "linear_kd_kl"
    _check_heads(op, student_hidden, teacher_hidden, weight, teacher_weight)
    _check_distillation(op, tau, mask, student_hidden, reduction)
    if chunk_rows < 1:
        raise ConfigError(f"{op}: chunk_rows is {chunk_rows}; expected at least 1")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ConfigError(f"{op}: softcap is {softcap}; expected a positive number, or None")
    trains = torch.is_grad_enabled()
    needs_hidden = trains and student_hidden.requires_grad
    needs_weight = trains and weight.requires_grad
    if needs_weight and reduction == "none":
        raise ConfigError(
            f"{op}: reduction 'none' cannot give the head's gradient; freeze weight, or use 'mean'"
        )
    lead = student_hidden.shape[:-1]
    rows = math.prod(lead)
    loss = _LinearKdKl.apply(
        student_hidden.reshape(rows, student_hidden.shape[-1]),
        teacher_hidden.detach().reshape(rows, teacher_hidden.shape[-1]),
        weight,
        None if teacher_weight is None else teacher_weight.detach(),
        None if mask is None else mask.reshape(rows),
        (float(tau), float(softcap or 0.0), chunk_rows, needs_hidden, needs_weight),
        reduction == "none",
    )
    if reduction == "none":
        return loss.reshape(lead)
    return loss if reduction == "sum" else loss / _count(mask, rows)
