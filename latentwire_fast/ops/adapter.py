"""Projection and RMS calibration (K2): the last stage of every adapter."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from latentwire_fast import reference
from latentwire_fast.errors import ConfigError, KernelError
from latentwire_fast.ops.dispatch import check_float, check_shape, one_of, register, uses_triton
from latentwire_fast.ops.folds import folded
from latentwire_fast.ops.quantize import check_packed, unpack_dequantize

if TYPE_CHECKING:
    from latentwire_fast.kernels.adapter import Projection

CALIBRATIONS = ("none", "token", "example", "batch")

_PARAMETERS = "Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, Tensor? gamma"
_SETTINGS = "float target_rms, str calibration, bool tanh"


def _dense(vector: Tensor | None) -> Tensor | None:
    """As the kernels index it."""
    return None if vector is None else vector.contiguous()


def _projection(
    shape: tuple[int, ...], dtype: torch.dtype, weight: Tensor, *arguments: Any
) -> Projection:
    """The kernels' arguments for rows x of a shape `[..., M, d]`."""
    from latentwire_fast.kernels import adapter as kernels

    bias, norm_weight, norm_bias, gamma, gain, target_rms, calibration, tanh = arguments
    group_rows = {"none": 0, "token": 1, "batch": math.prod(shape[:-1])}.get(calibration)
    folds = kernels.is_folded(shape[-1], tanh=tanh)
    return kernels.Projection(
        *(weight.contiguous(), _dense(bias), _dense(gamma)),
        norm=kernels.Norm(_dense(norm_weight), _dense(norm_bias), reference.LAYER_NORM_EPS),
        calibration=kernels.Calibration(
            *(gain, target_rms, reference.RMS_EPS),
            group_rows=shape[-2] if group_rows is None else group_rows,
        ),
        tanh=tanh,
        folded=folded(weight, bias, gamma, dtype=dtype) if folds else None,
    )


def _project_calibrate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    parameters = (weight, bias, norm_weight, norm_bias, gamma)
    if not uses_triton("project_calibrate", x, computes_in=reference.compute_dtype(x)):
        return reference.project_calibrate(x, *parameters, beta, *rest)
    from latentwire_fast.kernels import adapter as kernels

    projection = _projection(x.shape, x.dtype, *parameters, *rest)
    out, squares = kernels.project_calibrate(x.reshape(-1, x.shape[-1]), projection, _dense(beta))
    shape = _mean_square_shape(x, rest[-2])
    return out.view(*x.shape[:-1], weight.shape[0]), squares.reshape(shape)


def _mean_square_shape(x: Tensor, calibration: str) -> tuple[int, ...]:
    if calibration == "none":
        return (0,)
    if calibration == "token":
        return (*x.shape[:-1], 1)
    return (1,) * x.dim() if calibration == "batch" else (*x.shape[:-2], 1, 1)


def _project_calibrate_fake(x: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    shape = _mean_square_shape(x, arguments[-2])
    out = x.new_empty((*x.shape[:-1], weight.shape[0]))
    return out, x.new_empty(shape, dtype=reference.compute_dtype(x))


def _project_calibrate_backward(grad: Tensor, x: Tensor, *arguments: Any) -> list[Tensor]:
    needs = arguments[-1]
    if uses_triton("project_calibrate", x, computes_in=reference.compute_dtype(x)) and x.numel():
        from latentwire_fast.kernels import adapter_backward as kernels

        *tensors, squares, target_rms, calibration, tanh, needs = arguments
        settings = (target_rms, calibration, tanh)
        grads = kernels.project_calibrate_backward(
            *(grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1]), squares.reshape(-1)),
            _projection(x.shape, x.dtype, *tensors, *settings),
            needs,
        )
        grads[0] = None if grads[0] is None else grads[0].view(x.shape)
    else:
        grads = reference.project_calibrate_backward(grad, x, *arguments)
    return [g for g, needed in zip(grads, needs, strict=True) if needed and g is not None]


def _dequantize_project_calibrate(
    codes: Tensor,
    scales: Tensor,
    bits: int,
    group_size: int,
    shape: list[int],
    dtype: torch.dtype,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    *rest: Any,
) -> Tensor:
    computes_in = torch.float64 if dtype == torch.float64 else torch.float32
    parameters = (weight, bias, norm_weight, norm_bias, gamma)
    if not uses_triton("dequantize_project_calibrate", codes, computes_in=computes_in):
        return reference.dequantize_project_calibrate(
            *(codes, scales, bits, group_size, shape, dtype, *parameters, beta, *rest)
        )
    from latentwire_fast.kernels import adapter as kernels

    packed = kernels.Packed(
        *(codes.contiguous(), scales.contiguous(), bits, group_size),
        latents=shape[-2],
        width=shape[-1],
        dtype=dtype,
    )
    projection = _projection(tuple(shape), dtype, *parameters, *rest)
    out, _ = kernels.project_calibrate(packed, projection, _dense(beta))
    return out.view(*shape[:-1], weight.shape[0])


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


register(
    f"project_calibrate(Tensor x, {_PARAMETERS}, Tensor? beta, Tensor? gain, {_SETTINGS}) "
    "-> (Tensor, Tensor)",
    _project_calibrate,
    _project_calibrate_fake,
)
register(
    f"project_calibrate_backward(Tensor grad, Tensor x, {_PARAMETERS}, Tensor? gain, "
    f"Tensor mean_square, {_SETTINGS}, bool[8] needs) -> Tensor[]",
    _project_calibrate_backward,
    _project_calibrate_backward_fake,
)
register(
    "dequantize_project_calibrate(Tensor codes, Tensor scales, int bits, int group_size, "
    f"SymInt[] shape, ScalarType dtype, {_PARAMETERS}, Tensor? beta, Tensor? gain, {_SETTINGS}) "
    "-> Tensor",
    _dequantize_project_calibrate,
    lambda codes, scales, bits, group_size, shape, dtype, weight, *rest: codes.new_empty(
        (*shape[:-1], weight.shape[0]), dtype=dtype
    ),
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


def _checked(
    op: str,
    on: Tensor,
    shape: tuple[int, ...],
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    *,
    target_rms: float | None,
    gain: float | Tensor,
    calibration: str,
) -> tuple[float, Tensor | None]:
    """(target_rms times a gain that is a number, a gain that is a tensor), of arguments that fit.

    Args:
        on: the tensor whose device counts; shape: of the rows, `[..., M, d]`.
    """
    one_of(op, "calibration", calibration, CALIBRATIONS)
    if calibration != "none" and not (target_rms is not None and 0 < target_rms < math.inf):
        raise ConfigError(
            f"{op}: target_rms is {target_rms}; calibration {calibration!r} needs a positive number"
        )
    check_float(op, "weight", weight, dims=2)
    width, inner = weight.shape[0], shape[-1]
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
    for name, (tensor, expected) in shapes.items():
        if tensor is not None:
            check_float(op, name, tensor, dims=1)
        check_shape(op, name, tensor, expected, on)
    scale = 1.0 if calibration == "none" or target_rms is None else float(target_rms)
    if not isinstance(gain, Tensor):
        return scale * float(gain), None
    if gain.numel() != 1:
        raise KernelError(f"{op}: gain has shape {tuple(gain.shape)}; expected one element")
    gain = gain.reshape(())
    check_shape(op, "gain", gain, (), on)
    return scale, gain


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
    check_float("project_calibrate", "x", x, dims=2 if calibration == "example" else 1)
    scale, gain_tensor = _checked(
        "project_calibrate",
        x,
        tuple(x.shape),
        *(weight, bias, norm_weight, norm_bias, gamma, beta),
        target_rms=target_rms,
        gain=gain,
        calibration=calibration,
    )
    return _ProjectCalibrate.apply(
        *(x, weight, bias, norm_weight, norm_bias, gamma, beta),
        *(gain_tensor, scale, calibration, tanh),
    )


def dequantize_project_calibrate(
    codes: Tensor,
    scales: Tensor,
    *,
    bits: int,
    group_size: int,
    shape: tuple[int, ...],
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    target_rms: float | None = None,
    gain: float | Tensor = 1.0,
    calibration: str = "token",
    tanh: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`project_calibrate` of what `quantize_pack` packed: a payload's codes to prefix embeddings.

    The same as `unpack_dequantize` to fp32 and `project_calibrate`, but on a GPU the unpacked
    latent is never written. Where a parameter's gradient is asked for, the two are called one after
    the other, because backward needs the latent.

    Args:
        codes: `[..., code_bytes(M*d)]` uint8; scales: `[..., ceil(M*d / group_size)]` fp16.
        shape: of the latent, `(..., M, d)`.
        dtype: of the result, and of the rows that are multiplied; the weight's unless given.
        bits, group_size: as in `quantize_pack`; the rest: as in `project_calibrate`.

    Returns:
        `[..., M, D]`.

    Raises:
        ConfigError: bits, group size, calibration or target_rms.
        KernelError: shapes, dtypes or devices that do not fit.
    """
    op = "dequantize_project_calibrate"
    dtype = weight.dtype if dtype is None else dtype
    check_packed(op, codes, scales, bits=bits, group_size=group_size, shape=shape, dtype=dtype)
    parameters = (weight, bias, norm_weight, norm_bias, gamma, beta)
    scale, gain_tensor = _checked(
        *(op, codes, shape, *parameters), target_rms=target_rms, gain=gain, calibration=calibration
    )
    settings = (gain_tensor, scale, calibration, tanh)
    tensors = [t for t in (*parameters, gain_tensor) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        unpacked = torch.float64 if dtype == torch.float64 else torch.float32
        x = unpack_dequantize(
            codes, scales, bits=bits, group_size=group_size, shape=shape, dtype=unpacked
        )
        return _ProjectCalibrate.apply(x, *parameters, *settings).to(dtype)
    batch = math.prod(shape[:-2])
    return torch.ops.latentwire_fast.dequantize_project_calibrate(
        codes.reshape(batch, codes.shape[-1]),
        scales.reshape(batch, scales.shape[-1]),
        *(bits, group_size, shape, dtype, *parameters, *settings),
    )
