"""Projection and RMS calibration (K2): the last stage of every adapter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from latentwire_fast import reference
from latentwire_fast.errors import ConfigError, KernelError
from latentwire_fast.ops.dispatch import (
    check_float,
    check_shape,
    is_number,
    one_of,
    register,
    uses_triton,
)
from latentwire_fast.ops.projection_cache import folded

if TYPE_CHECKING:
    from latentwire_fast.kernels.projection import Projection

CALIBRATIONS = ("none", "token", "example", "batch")

PARAMETERS = "Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, Tensor? gamma"
SETTINGS = "float target_rms, str calibration, bool tanh"


def dense(vector: Tensor | None) -> Tensor | None:
    """As the kernels index it."""
    return None if vector is None else vector.contiguous()


def is_empty(shape: Sequence[int], weight: Tensor) -> bool:
    """Whether a projection has no rows, or rows of no values: those are the reference's."""
    return not (math.prod(shape) and weight.numel())


def projection_of(
    shape: tuple[int, ...], dtype: torch.dtype, weight: Tensor, *arguments: Any
) -> Projection:
    """The kernels' arguments for rows x of a shape `[..., M, d]`."""
    from latentwire_fast.kernels import projection as kernels

    bias, norm_weight, norm_bias, gamma, gain, target_rms, calibration, tanh = arguments
    group_rows = {"none": 0, "token": 1, "batch": math.prod(shape[:-1])}.get(calibration)
    folds = kernels.is_folded(shape[-1], tanh=tanh)
    return kernels.Projection(
        *(weight.contiguous(), dense(bias), dense(gamma)),
        norm=kernels.Norm(dense(norm_weight), dense(norm_bias), reference.LAYER_NORM_EPS),
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
    triton = uses_triton("project_calibrate", x, computes_in=reference.compute_dtype(x))
    if not triton or is_empty(x.shape, weight):
        return reference.project_calibrate(x, *parameters, beta, *rest)
    from latentwire_fast.kernels import projection as kernels

    projection = projection_of(x.shape, x.dtype, *parameters, *rest)
    out, squares = kernels.project_calibrate(x.reshape(-1, x.shape[-1]), projection, dense(beta))
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


def _project_calibrate_backward(
    grad: Tensor, x: Tensor, weight: Tensor, *arguments: Any
) -> list[Tensor]:
    needs = arguments[-1]
    triton = uses_triton("project_calibrate", x, computes_in=reference.compute_dtype(x))
    if triton and not is_empty(x.shape, weight):
        from latentwire_fast.kernels import projection_backward as kernels

        *others, squares, target_rms, calibration, tanh, needs = arguments
        settings = (target_rms, calibration, tanh)
        grads = kernels.project_calibrate_backward(
            *(grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1]), squares.reshape(-1)),
            projection_of(x.shape, x.dtype, weight, *others, *settings),
            needs,
        )
        grads[0] = None if grads[0] is None else grads[0].view(x.shape)
    else:
        grads = reference.project_calibrate_backward(grad, x, weight, *arguments)
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


register(
    f"project_calibrate(Tensor x, {PARAMETERS}, Tensor? beta, Tensor? gain, {SETTINGS}) "
    "-> (Tensor, Tensor)",
    _project_calibrate,
    _project_calibrate_fake,
)
register(
    f"project_calibrate_backward(Tensor grad, Tensor x, {PARAMETERS}, Tensor? gain, "
    f"Tensor mean_square, {SETTINGS}, bool[8] needs) -> Tensor[]",
    _project_calibrate_backward,
    _project_calibrate_backward_fake,
)


class ProjectCalibrate(torch.autograd.Function):
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


def checked(
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
    if calibration != "none" and not (
        is_number(target_rms) and target_rms > 0  # type: ignore[operator]
    ):
        raise ConfigError(
            f"{op}: target_rms is {target_rms!r}; calibration {calibration!r} needs a positive "
            "number"
        )
    check_float(op, "weight", weight, dims=2)
    if weight.dim() != 2:
        raise KernelError(f"{op}: weight has shape {tuple(weight.shape)}; expected two dimensions")
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
        if not is_number(gain):
            raise ConfigError(f"{op}: gain is {gain!r}; expected a finite number, or a tensor")
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
    scale, gain_tensor = checked(
        "project_calibrate",
        x,
        tuple(x.shape),
        *(weight, bias, norm_weight, norm_bias, gamma, beta),
        target_rms=target_rms,
        gain=gain,
        calibration=calibration,
    )
    return ProjectCalibrate.apply(
        *(x, weight, bias, norm_weight, norm_bias, gamma, beta),
        *(gain_tensor, scale, calibration, tanh),
    )
