"""K2: projection and RMS calibration, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from latentwire_fast.reference.precision import compute_dtype
from latentwire_fast.reference.quantization import unpack_dequantize

LAYER_NORM_EPS = 1e-5
# Far below any embedding's mean square (an LLM's is 1e-4 and up), far above fp32's smallest normal.
RMS_EPS = 1e-8
# The dimensions of y `[..., M, D]` that share one mean square.
CALIBRATION_DIMS: dict[str, tuple[int, ...]] = {"token": (-1,), "example": (-2, -1), "batch": ()}


def _projected(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    tanh: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """y, the normalised x, and for LayerNorm's backward the standardised x and 1/deviation."""
    c = compute_dtype(x)
    normed, standard, rstd = x.to(c), None, None
    if norm_weight is not None:
        centred = normed - normed.mean(-1, keepdim=True)
        rstd = (centred.square().mean(-1, keepdim=True) + LAYER_NORM_EPS).rsqrt()
        standard = centred * rstd
        normed = standard * norm_weight.to(c)
        normed = normed if norm_bias is None else normed + norm_bias.to(c)
    y = F.linear(normed, weight.to(c), None if bias is None else bias.to(c))
    return (y.tanh() if tanh else y), normed, standard, rstd


def _unit_scale(mean_square: Tensor, target_rms: float, calibration: str) -> Tensor | float:
    """The calibration's factor without the gain's tensor part."""
    if calibration == "none":
        return target_rms
    return target_rms * (mean_square + RMS_EPS).rsqrt()


def project_calibrate(
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
) -> tuple[Tensor, Tensor]:
    """`gamma * s * y + beta`, `y = W norm(x) + b` (or its tanh), `s = target_rms * gain / rms(y)`.

    Returns `out [..., M, D]` in x's dtype, and the mean squares of y (`[..., M, 1]` per token,
    `[..., 1, 1]` per example, all dimensions 1 per batch, empty with calibration `none`, where
    `s = target_rms * gain`).
    """
    y, *_ = _projected(x, weight, bias, norm_weight, norm_bias, tanh)
    if calibration == "none":
        mean_square = y.new_empty(0)
    else:
        mean_square = y.square().mean(CALIBRATION_DIMS[calibration] or None, keepdim=True)
    out = y * _unit_scale(mean_square, target_rms, calibration)
    if gain is not None:
        out = out * gain.to(y.dtype)
    if gamma is not None:
        out = out * gamma.to(y.dtype)
    if beta is not None:
        out = out + beta.to(y.dtype)
    return out.to(x.dtype), mean_square


def dequantize_project_calibrate(
    codes_Bb: Tensor,
    scales_BG: Tensor,
    bits: int,
    group_size: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    *projection: Any,
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
    return project_calibrate(x.view(*shape), *projection)[0].to(dtype)


def project_calibrate_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    gamma: Tensor | None,
    gain: Tensor | None,
    mean_square: Tensor,
    target_rms: float,
    calibration: str,
    tanh: bool,
    needs: list[bool],
) -> list[Tensor | None]:
    """Gradients of x, weight, bias, norm_weight, norm_bias, gamma, beta, gain; None if not needed.

    With `v = gamma * dout` and the sums over the values that share a mean square r2 of count c:
    `dy = s*v - y * s * sum(v*y) / (c * (r2 + eps))`.
    """
    y, normed, standard, rstd = _projected(x, weight, bias, norm_weight, norm_bias, tanh)
    c = y.dtype
    rows = tuple(range(y.dim() - 1))
    unit = _unit_scale(mean_square, target_rms, calibration)
    s = unit if gain is None else unit * gain.to(c)
    dout = grad.to(c)
    v = dout if gamma is None else dout * gamma.to(c)
    d_gamma = (dout * y * s).sum(rows) if needs[5] else None
    d_beta = dout.sum(rows) if needs[6] else None
    d_gain = (v * y * unit).sum() if needs[7] else None
    dy = v * s
    if calibration != "none":
        shared = CALIBRATION_DIMS[calibration] or tuple(range(y.dim()))
        count = y.numel() // max(mean_square.numel(), 1)
        along = (v * y).sum(shared, keepdim=True) / (count * (mean_square + RMS_EPS))
        dy = dy - y * (s * along)
    if tanh:
        dy = dy * (1 - y.square())
    d_weight = dy.flatten(0, -2).T @ normed.flatten(0, -2) if needs[1] else None
    d_bias = dy.sum(rows) if needs[2] else None
    d_norm_weight = d_norm_bias = d_x = None
    if needs[0] or needs[3] or needs[4]:
        d_x = dy @ weight.to(c)
    if standard is not None and rstd is not None and norm_weight is not None and d_x is not None:
        d_norm_weight = (d_x * standard).sum(rows)
        d_norm_bias = d_x.sum(rows)
        h = d_x * norm_weight.to(c)
        mean = h.mean(-1, keepdim=True)
        d_x = rstd * (h - mean - standard * (h * standard).mean(-1, keepdim=True))
    grads = (d_x, d_weight, d_bias, d_norm_weight, d_norm_bias, d_gamma, d_beta, d_gain)
    return [g if needed else None for g, needed in zip(grads, needs, strict=True)]
