"""Projection and RMS calibration, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from latentwire_fast.reference.precision import compute_dtype
from latentwire_fast.reference.quantization import unpack_dequantize

LAYER_NORM_EPS = 1e-5
# Far below any embedding's mean square (an LLM's is 1e-4 and up), far above fp32's smallest normal.
RMS_EPS = 1e-8
# The dimensions of y `[..., M, G, w]`, cut into G groups of outputs, that share one mean square.
CALIBRATION_DIMS: dict[str, tuple[int, ...]] = {"token": (-1,), "example": (-3, -1)}


class ProjectionParameters(NamedTuple):
    """The tensors of a projection: weight `[D, d]`; bias, gamma, beta `[D]`; norm_* `[d]`.

    gain multiplies s: of no dimensions, or `[G]` where the outputs are cut into G > 1 groups.
    """

    weight: Tensor
    bias: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    gamma: Tensor | None = None
    beta: Tensor | None = None
    gain: Tensor | None = None


class ProjectionSettings(NamedTuple):
    """What is no tensor: the RMS to reach (times a gain that is a number), which values share a
    mean square (`ops.project_calibrate` has the words), in how many groups of outputs, and whether
    y is a tanh."""

    target_rms: float
    calibration: str
    groups: int
    tanh: bool


def _projected(
    x: Tensor, p: ProjectionParameters, tanh: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """y, the normalised x, and for LayerNorm's backward the standardised x and 1/deviation."""
    c = compute_dtype(x)
    normed, standard, rstd = x.to(c), None, None
    if p.norm_weight is not None:
        centred = normed - normed.mean(-1, keepdim=True)
        rstd = (centred.square().mean(-1, keepdim=True) + LAYER_NORM_EPS).rsqrt()
        standard = centred * rstd
        normed = standard * p.norm_weight.to(c)
        normed = normed if p.norm_bias is None else normed + p.norm_bias.to(c)
    y = F.linear(normed, p.weight.to(c), None if p.bias is None else p.bias.to(c))
    return (y.tanh() if tanh else y), normed, standard, rstd


def _grouped(y: Tensor, groups: int) -> Tensor:
    """`[..., D]` as `[..., G, D / G]`."""
    return y.reshape(*y.shape[:-1], groups, y.shape[-1] // groups)


def _shared(y: Tensor, calibration: str) -> tuple[int, ...]:
    """The dimensions of a grouped y that share a mean square."""
    everything = (*range(y.dim() - 2), y.dim() - 1)
    return CALIBRATION_DIMS.get(calibration, everything)


def _unit_scale(mean_square: Tensor, settings: ProjectionSettings) -> Tensor | float:
    """The calibration's factor, of a grouped y, without the gain's tensor part."""
    if settings.calibration == "none":
        return settings.target_rms
    return settings.target_rms * (mean_square.unsqueeze(-1) + RMS_EPS).rsqrt()


def _gain(p: ProjectionParameters, c: torch.dtype) -> Tensor | None:
    """`[1, 1]` or `[G, 1]`, against a grouped y."""
    return None if p.gain is None else p.gain.to(c).reshape(-1, 1)


def project_calibrate(
    x: Tensor, p: ProjectionParameters, settings: ProjectionSettings
) -> tuple[Tensor, Tensor]:
    """`gamma * s * y + beta`, `y = W norm(x) + b` (or its tanh), `s = target_rms * gain / rms(y)`.

    With G groups the D outputs are cut into G of D / G neighbours, each with its own rms(y) and
    gain: keys and values of every layer, made by one projection.

    Returns `out [..., M, D]` in x's dtype, and the mean squares of y (`[..., M, G]` per token,
    `[..., 1, G]` per example, `[1, ..., G]` per batch, empty with calibration `none`, where `s =
    target_rms * gain`).
    """
    y, *_ = _projected(x, p, settings.tanh)
    wide = _grouped(y, settings.groups)
    if settings.calibration == "none":
        mean_square = y.new_empty(0)
    else:
        shared = _shared(wide, settings.calibration)
        mean_square = wide.square().mean(shared, keepdim=True).squeeze(-1)
    wide = wide * _unit_scale(mean_square, settings)
    gain = _gain(p, y.dtype)
    out = (wide if gain is None else wide * gain).reshape(y.shape)
    if p.gamma is not None:
        out = out * p.gamma.to(y.dtype)
    if p.beta is not None:
        out = out + p.beta.to(y.dtype)
    return out.to(x.dtype), mean_square


def dequantize_project_calibrate(
    codes_Bb: Tensor,
    scales_BG: Tensor,
    bits: int,
    group_size: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    p: ProjectionParameters,
    settings: ProjectionSettings,
) -> Tensor:
    """`project_calibrate` of the latent, of a shape `[..., M, d]`, that the codes stand for.

    Rounded to `dtype` once, at the end.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = unpack_dequantize(
        *(codes_Bb, scales_BG),
        bits=bits,
        group_size=group_size,
        values=shape[-2] * shape[-1],
        dtype=wide,
    )
    return project_calibrate(x.view(*shape), p, settings)[0].to(dtype)


def project_calibrate_backward(
    grad: Tensor,
    x: Tensor,
    p: ProjectionParameters,
    mean_square: Tensor,
    settings: ProjectionSettings,
    needs: list[bool],
) -> list[Tensor | None]:
    """Gradients of x and of the parameters in their order; None if not needed.

    With `v = gamma * dout` and the sums over the values that share a mean square r2 of count c:
    `dy = s*v - y * s * sum(v*y) / (c * (r2 + eps))`.
    """
    y, normed, standard, rstd = _projected(x, p, settings.tanh)
    c = y.dtype
    rows = tuple(range(y.dim() - 1))
    wide = _grouped(y, settings.groups)
    unit = _unit_scale(mean_square, settings)
    gain = _gain(p, c)
    s = unit if gain is None else unit * gain
    dout = grad.to(c)
    v = _grouped(dout if p.gamma is None else dout * p.gamma.to(c), settings.groups)
    d_gamma = (dout * (wide * s).reshape(y.shape)).sum(rows) if needs[5] else None
    d_beta = dout.sum(rows) if needs[6] else None
    d_gain = None
    if needs[7] and p.gain is not None:
        d_gain = (v * wide * unit).sum((*rows, -1)).reshape(p.gain.shape)
    d_wide = v * s
    if settings.calibration != "none":
        shared = _shared(wide, settings.calibration)
        count = y.numel() // max(mean_square.numel(), 1)
        along = (v * wide).sum(shared, keepdim=True)
        along = along / (count * (mean_square.unsqueeze(-1) + RMS_EPS))
        d_wide = d_wide - wide * (s * along)
    dy = d_wide.reshape(y.shape)
    if settings.tanh:
        dy = dy * (1 - y.square())
    d_weight = dy.flatten(0, -2).T @ normed.flatten(0, -2) if needs[1] else None
    d_bias = dy.sum(rows) if needs[2] else None
    d_norm_weight = d_norm_bias = d_x = None
    if needs[0] or needs[3] or needs[4]:
        d_x = dy @ p.weight.to(c)
    if standard is not None and rstd is not None and p.norm_weight is not None and d_x is not None:
        d_norm_weight = (d_x * standard).sum(rows)
        d_norm_bias = d_x.sum(rows)
        h = d_x * p.norm_weight.to(c)
        mean = h.mean(-1, keepdim=True)
        d_x = rstd * (h - mean - standard * (h * standard).mean(-1, keepdim=True))
    grads = (d_x, d_weight, d_bias, d_norm_weight, d_norm_bias, d_gamma, d_beta, d_gain)
    return [g if needed else None for g, needed in zip(grads, needs, strict=True)]
