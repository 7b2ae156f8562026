"""Projection and RMS calibration: the last stage of every adapter."""

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
    autocast_dtype,
    check_float,
    check_shape,
    is_number,
    one_of,
    register,
    uses_triton,
)
from latentwire_fast.ops.projection_cache import folded, keep, kept
from latentwire_fast.reference import ProjectionParameters, ProjectionSettings

if TYPE_CHECKING:
    from latentwire_fast.kernels.projection import Folded, Projection

CALIBRATIONS = ("none", "token", "example", "batch")

# The fields of `ProjectionParameters` and `ProjectionSettings`, which an op takes one by one.
PARAMETERS = (
    "Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, Tensor? gamma, "
    "Tensor? beta, Tensor? gain"
)
SETTINGS = "float target_rms, str calibration, int groups, bool tanh"
PARAMETER_COUNT = len(ProjectionParameters._fields)


def gathered(arguments: tuple[Any, ...]) -> tuple[ProjectionParameters, ProjectionSettings]:
    """The objects of an op's arguments from `weight` to `tanh`."""
    tensors, rest = arguments[:PARAMETER_COUNT], arguments[PARAMETER_COUNT:]
    return ProjectionParameters(*tensors), ProjectionSettings(*rest)


def dense(vector: Tensor | None) -> Tensor | None:
    """As the kernels index it."""
    return None if vector is None else vector.contiguous()


def is_empty(shape: Sequence[int], weight: Tensor) -> bool:
    """Whether a projection has no rows, or rows of no values: those are the reference's."""
    return not (math.prod(shape) and weight.numel())


def projection_of(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    p: ProjectionParameters,
    settings: ProjectionSettings,
    known: Folded | None = None,
) -> Projection:
    """The kernels' arguments for rows x of a shape `[..., M, d]`; known: the folded parameters."""
    from latentwire_fast.kernels import projection as kernels

    group_rows = {"none": 0, "token": 1, "batch": math.prod(shape[:-1])}.get(settings.calibration)
    folds = kernels.is_folded(shape[-1], groups=settings.groups, tanh=settings.tanh)
    norm = kernels.Norm(p.norm_weight, p.norm_bias, reference.LAYER_NORM_EPS)
    if folds and known is None:
        known = folded(p.weight, p.bias, p.gamma, norm, dtype=dtype)
    return kernels.Projection(
        *(p.weight.contiguous(), dense(p.bias), dense(p.gamma)),
        norm=kernels.Norm(dense(p.norm_weight), dense(p.norm_bias), norm.eps),
        calibration=kernels.Calibration(
            *(dense(p.gain), settings.target_rms, reference.RMS_EPS),
            group_rows=shape[-2] if group_rows is None else group_rows,
            groups=settings.groups,
        ),
        tanh=settings.tanh,
        folded=known if folds else None,
    )


def _on_triton(x: Tensor, weight: Tensor) -> bool:
    asked = uses_triton("project_calibrate", x, computes_in=reference.compute_dtype(x))
    return asked and not is_empty(x.shape, weight)


def _project_calibrate(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    p, settings = gathered(arguments)
    if not _on_triton(x, p.weight):
        return reference.project_calibrate(x, p, settings)
    from latentwire_fast.kernels import projection as kernels

    projection = projection_of(x.shape, x.dtype, p, settings)
    out, squares = kernels.project_calibrate(x.reshape(-1, x.shape[-1]), projection, dense(p.beta))
    mean_square = squares.reshape(_mean_square_shape(x, settings))
    keep(mean_square, projection.folded)
    return out.view(*x.shape[:-1], p.weight.shape[0]), mean_square


def _mean_square_shape(x: Tensor, settings: ProjectionSettings) -> tuple[int, ...]:
    if settings.calibration == "none":
        return (0,)
    if settings.calibration == "example":
        return (*x.shape[:-2], 1, settings.groups)
    if settings.calibration == "batch":
        return (*[1] * (x.dim() - 1), settings.groups)
    return (*x.shape[:-1], settings.groups)


def _project_calibrate_fake(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    p, settings = gathered(arguments)
    out = x.new_empty((*x.shape[:-1], p.weight.shape[0]))
    shape = _mean_square_shape(x, settings)
    return out, x.new_empty(shape, dtype=reference.compute_dtype(x))


def _project_calibrate_backward(
    grad: Tensor, x: Tensor, mean_square: Tensor, needs: list[bool], *arguments: Any
) -> list[Tensor]:
    p, settings = gathered(arguments)
    if _on_triton(x, p.weight):
        from latentwire_fast.kernels import projection_backward as kernels

        rows = (t.reshape(-1, t.shape[-1]) for t in (grad, x))
        projection = projection_of(x.shape, x.dtype, p, settings, kept(mean_square))
        grads = kernels.project_calibrate_backward(
            *rows, mean_square.reshape(-1), projection, needs
        )
        grads[0] = None if grads[0] is None else grads[0].view(x.shape)
    else:
        grads = reference.project_calibrate_backward(grad, x, p, mean_square, settings, needs)
    found = zip(grads, needs, (x, *p), strict=True)
    return [g.to(t.dtype) for g, needed, t in found if needed and g is not None and t is not None]


def _project_calibrate_backward_fake(
    grad: Tensor, x: Tensor, mean_square: Tensor, needs: list[bool], *arguments: Any
) -> list[Tensor]:
    tensors = (x, *gathered(arguments)[0])
    wanted = zip(tensors, needs, strict=True)
    return [x.new_empty(t.shape, dtype=t.dtype) for t, needed in wanted if needed and t is not None]


register(
    f"project_calibrate(Tensor x, {PARAMETERS}, {SETTINGS}) -> (Tensor, Tensor)",
    _project_calibrate,
    _project_calibrate_fake,
)
register(
    "project_calibrate_backward(Tensor grad, Tensor x, Tensor mean_square, bool[8] needs, "
    f"{PARAMETERS}, {SETTINGS}) -> Tensor[]",
    _project_calibrate_backward,
    _project_calibrate_backward_fake,
)


class ProjectCalibrate(torch.autograd.Function):
    """Saves x, the mean squares and the parameters; y is made again, or not needed, in backward.

    Call `applied`: a Function takes its tensors one by one.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *arguments: Any) -> Tensor:
        p, settings = gathered(arguments)
        out, mean_square = torch.ops.latentwire_fast.project_calibrate(x, *p, *settings)
        ctx.save_for_backward(x, mean_square, *p)
        ctx.settings = tuple(settings)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean_square, *parameters = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[: 1 + PARAMETER_COUNT])
        found = iter(
            torch.ops.latentwire_fast.project_calibrate_backward(
                grad.contiguous(), x, mean_square, needs, *parameters, *ctx.settings
            )
        )
        grads = [next(found) if needed else None for needed in needs]
        return (*grads, *[None] * len(ctx.settings))


def applied(x: Tensor, p: ProjectionParameters, settings: ProjectionSettings) -> Tensor:
    """The op, differentiable."""
    return ProjectCalibrate.apply(x, *p, *settings)


def _check_tensors(op: str, on: Tensor, inner: int, p: ProjectionParameters) -> None:
    check_float(op, "weight", p.weight, dims=2)
    if p.weight.dim() != 2:
        raise KernelError(
            f"{op}: weight has shape {tuple(p.weight.shape)}; expected two dimensions"
        )
    if p.norm_bias is not None and p.norm_weight is None:
        raise KernelError(f"{op}: norm_bias without norm_weight; give both, or norm_weight alone")
    width = p.weight.shape[0]
    shapes = {"weight": (width, inner), "norm_weight": (inner,), "norm_bias": (inner,)}
    for name in ("weight", "bias", "norm_weight", "norm_bias", "gamma", "beta"):
        tensor = getattr(p, name)
        if tensor is not None:
            check_float(op, name, tensor, dims=1)
        check_shape(op, name, tensor, shapes.get(name, (width,)), on)


def _factor(op: str, name: str, value: object, groups: int, on: Tensor) -> float | Tensor:
    """A gain or a target RMS: a number, or a tensor `[G]` (of one group: of no dimensions)."""
    if not isinstance(value, Tensor):
        return float(value)  # type: ignore[arg-type]
    check_float(op, name, value, dims=0)
    if value.numel() not in (1, groups):
        raise KernelError(
            f"{op}: {name} has shape {tuple(value.shape)}; expected one element"
            + (f" or {groups}, one a group" if groups > 1 else "")
        )
    factor = value.reshape(-1).expand(groups) if groups > 1 else value.reshape(())
    check_shape(op, name, factor, (groups,) if groups > 1 else (), on)
    return factor


def checked(
    op: str,
    on: Tensor,
    inner: int,
    p: ProjectionParameters,
    *,
    target_rms: float | Tensor | None,
    gain: float | Tensor,
    calibration: str,
    groups: int,
    tanh: bool,
) -> tuple[ProjectionParameters, ProjectionSettings]:
    """The same parameters with their gain, and the settings, of arguments that fit.

    Args:
        on: the tensor whose device counts; inner: width d of the rows.
    """
    one_of(op, "calibration", calibration, CALIBRATIONS)
    if type(groups) is not int or groups < 1:
        raise ConfigError(f"{op}: groups is {groups!r}; expected a whole number of at least 1")
    needed = calibration != "none"
    if needed and not (
        isinstance(target_rms, Tensor) or (is_number(target_rms) and target_rms > 0)  # type: ignore[operator]
    ):
        raise ConfigError(
            f"{op}: target_rms is {target_rms!r}; calibration {calibration!r} needs a positive "
            "number, or a tensor of them"
        )
    if not (isinstance(gain, Tensor) or is_number(gain)):
        raise ConfigError(f"{op}: gain is {gain!r}; expected a finite number, or a tensor")
    _check_tensors(op, on, inner, p)
    if p.weight.shape[0] % groups:
        raise KernelError(
            f"{op}: {p.weight.shape[0]} outputs do not divide among {groups} groups; expected rows "
            "of weight in groups of equal size"
        )
    scale, total = 1.0, None
    for name, value in (("gain", gain), ("target_rms", target_rms if needed else 1.0)):
        factor = _factor(op, name, value, groups, on)
        if isinstance(factor, Tensor):
            total = factor if total is None else total * factor
        else:
            scale *= factor
    return p._replace(gain=total), ProjectionSettings(scale, calibration, groups, tanh)


def project_calibrate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    target_rms: float | Tensor | None = None,
    gain: float | Tensor = 1.0,
    calibration: str = "token",
    groups: int = 1,
    tanh: bool = False,
) -> Tensor:
    """`gamma * s * y + beta` with `y = W norm(x) + b`, and s such that `s * y` has a given RMS.

    The adapter's last stage: a projection into a reader's input space, brought to the root mean
    square of its own embeddings. Differentiable (once) in every tensor argument. Under
    `torch.autocast` x is rounded to its dtype, in which W x is multiplied, as by a Linear;
    LayerNorm, mean squares and calibration stay fp32.

    Args:
        x: `[..., d]`, or `[..., M, d]` for calibration per example.
        weight: `[D, d]`; bias: `[D]`.
        norm_weight: `[d]`: LayerNorm of x first, with `norm_bias` `[d]` if given.
        gamma: `[D]`, per-channel factor after the calibration; beta: `[D]`, offset.
        target_rms: the RMS to reach; needed unless `calibration` is `none`, which ignores it. A
            number, or a tensor of one element or `[groups]`.
        gain: multiplies s (with calibration `none`, it is s); likewise.
        calibration: which values share one RMS: a `token`'s D, an `example`'s M*D, the whole
            `batch`'s; `none` leaves y as it is.
        groups: the D outputs are cut into so many groups of neighbours, each of which has mean
            squares, a target and a gain of its own (keys or values of one layer).
        tanh: y is the tanh of the projection.

    Returns:
        `[..., D]` in x's dtype, or autocast's.

    Raises:
        ConfigError: an unknown calibration, no positive target_rms for it, or groups below 1.
        KernelError: shapes, dtypes or devices that do not fit, groups that do not divide D.
    """
    check_float("project_calibrate", "x", x, dims=2 if calibration == "example" else 1)
    parameters, settings = checked(
        *("project_calibrate", x, x.shape[-1]),
        ProjectionParameters(weight, bias, norm_weight, norm_bias, gamma, beta),
        target_rms=target_rms,
        gain=gain,
        calibration=calibration,
        groups=groups,
        tanh=tanh,
    )
    # What comes before is often a sum or a LayerNorm, which autocast leaves in fp32.
    return applied(x.to(autocast_dtype(x) or x.dtype), parameters, settings)
