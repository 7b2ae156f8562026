"""Projection and RMS calibration: `gamma * s * y + beta`, `y = f(W norm(x) + b)`, f 1 or tanh.

s = target_rms * gain / sqrt(r2 + eps), r2 the mean square of y over a token, an example or the
batch. s needs r2, and r2 all of a row's y, which is the large tensor: `[N, D]`, D >> d.

Folded (without tanh, d <= 512). No y is needed for r2: ||W x + b||^2 = x'Gx + 2c'x + b'b with
G = W'W, c = W'b. With P = (W | b | 0) `[D, K]` all three lie in P'P `[K, K]`, and

    rows     X = [s x, s, 1, 0 ...] `[N, K]`      one kernel: unpack, LayerNorm, G, s
    output   X (gamma * P)' + beta                 one matmul, beta its bias

Half precision rows take r2 from (W | b) = Q R instead where the parameters are frozen: see
`projection_halves`.

Turned (half precision rows with LayerNorm, d a multiple of 8). K = d: a matmul takes K in steps of
64, and d + 2 would be one step more, 90 us in the place of 66 on an H100. LayerNorm's standardised
x^ sums to 0, so that d - 1 numbers hold it, and its last place is free for the 1 that b needs. With
the reflection H that takes (1, 1, ...) / sqrt(d) to the last axis and leaves lengths as they are,

    z = (H x^, last value replaced by 1)     z_j = x^_j + x^_last / (sqrt(d) - 1)
    P = (W_n H, last column replaced by b_n), W_n = W diag(norm weight), b_n = b + W norm_bias

P z = W x + b. As H is orthogonal nothing grows: half precision rounds z and P as it would x and W.
b is as exact as in a column of its own, also where x^ is 0. All that follows holds with z for
[x, 1], and G = P'P, [d, d].

Traffic N*D*e + D*K*e + 2*N*(d + K)*e bytes, arithmetic 2*N*D*K and 2*N*d^2 (for fp32 rows N*d^2
times three). At d = 256 the arithmetic is the floor: 2*D*d / F = 2.7 ns per row at D = 4096 and
790 TFLOP/s, against 1.9 ns to write it at 4.3 TB/s. G pays while 3*d^2 / F < 2*D*e / BW, what
writing y and reading it back would cost: d < 1000 for D = 4096 if its tiles ran at the peak rate;
they are small and at half of it the bound is 700. G of `[D, D]` (the MLP adapter) would cost as
much as the projection.

Backward needs no y either, `projection_backward`. Saved: x and r2.

Everything else (tanh; d > 512; groups) goes through tiles of y, `projection_tiles`.

Groups of outputs, each with its own r2 (a deep prefix: keys or values of a layer; w = D / groups of
them), would need a Gram matrix each: groups*d^2 fp32 numbers read instead of y, N*D, written and
read twice in a half precision. That is less only where d^2 < N*w, and the deep prefix of an 8B
reader has d = 512, w = 1024 and N = 32 to 512 rows, d^2 = 262144 against 32768 to 524288. While it
trains the matrices are made anew, 2*D*d^2 FLOPs, more than the projection's 2*N*D*d where N < d.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from latentwire_fast.kernels.matmul import matmul_fp32
from latentwire_fast.kernels.projection_halves import Factor, factor_of
from latentwire_fast.kernels.projection_rows import (
    Calibration,
    Norm,
    Packed,
    normalised_rows,
    scaled_rows,
)
from latentwire_fast.kernels.projection_tiles import Tiles

# The widest x whose Gram matrix is used.
GRAM_WIDTH = 512
NO_NORM = Norm(None, None, 0.0)
# Outputs that a program folds.
FOLDED_ROWS = 8


@dataclass(frozen=True)
class Folded:
    """What the folded form needs of the parameters, whatever the rows.

    plain: P = (W | b | 0) `[D, K]` in W's dtype; scaled: gamma * P in the rows' dtype; gram: P'P
    `[K, K]` fp32. K is d + 2 rounded up to 8, so that rows are whole 16-byte pieces. factor: in the
    place of G for half precision rows, of parameters that stay as they are. turned: P is that of
    turned rows, and K = d.
    """

    plain: Tensor
    scaled: Tensor
    gram: Tensor
    factor: Factor | None = None
    turned: bool = False


@dataclass(frozen=True)
class Projection:
    """The arguments that forward and backward share; weight `[D, d]`, bias and gamma `[D]`."""

    weight: Tensor
    bias: Tensor | None
    gamma: Tensor | None
    norm: Norm
    calibration: Calibration
    tanh: bool
    # Of weight, bias and gamma as they are now; None goes through tiles.
    folded: Folded | None


def is_folded(width: int, *, groups: int, tanh: bool) -> bool:
    """Whether rows of so many values go through the Gram matrix."""
    return groups == 1 and not tanh and width <= GRAM_WIDTH


def is_turned(width: int, norm: Norm, dtype: torch.dtype) -> bool:
    """Whether folded rows of this dtype are turned."""
    return norm.weight is not None and width % 8 == 0 and dtype != torch.float32


@triton.jit(do_not_specialize=["outputs"])
def _fold_kernel(
    weight_ptr, bias_ptr, gamma_ptr, norm_weight_ptr, norm_bias_ptr, plain_ptr, scaled_ptr, outputs,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GAMMA: tl.constexpr,
    TURNED: tl.constexpr, HAS_NORM_BIAS: tl.constexpr, TILE_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """P and gamma * P. The norm's parameters are read if TURNED."""
    output = tl.program_id(0).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    live = output < outputs
    plain = tl.load(
        weight_ptr + output[:, None] * WIDTH + column,
        mask=live[:, None] & (column < WIDTH),
        other=0.0,
    ).to(tl.float32)
    bias = tl.zeros((TILE_ROWS,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + output, mask=live, other=0.0).to(tl.float32)
    if TURNED:
        inside = column < WIDTH
        if HAS_NORM_BIAS:
            offset = tl.load(norm_bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
            bias += tl.sum(plain * offset, 1)
        plain *= tl.load(norm_weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
        ROOT: tl.constexpr = WIDTH**0.5
        last = tl.sum(tl.where(column == WIDTH - 1, plain, 0.0), 1)
        shift = (tl.sum(plain, 1) / ROOT - last) / (ROOT - 1.0)
        plain = tl.where(column == WIDTH - 1, bias[:, None], plain - shift[:, None])
    elif HAS_BIAS:
        plain = tl.where(column == WIDTH, bias[:, None], plain)
    scaled = plain
    if HAS_GAMMA:
        scaled *= tl.load(gamma_ptr + output, mask=live, other=0.0).to(tl.float32)[:, None]
    place = output[:, None] * PADDED + column
    inside = live[:, None] & (column < PADDED)
    tl.store(plain_ptr + place, plain.to(plain_ptr.dtype.element_ty), mask=inside)
    tl.store(scaled_ptr + place, scaled.to(scaled_ptr.dtype.element_ty), mask=inside)


def fold(
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    norm: Norm = NO_NORM,
    *,
    dtype: torch.dtype,
    frozen: bool = False,
) -> Folded:
    """Two launches. `dtype` is the rows'; `frozen`: with the factor, which takes milliseconds."""
    weight = weight.contiguous()
    outputs, width = weight.shape
    turned = is_turned(width, norm, dtype)
    padded = width if turned else -(-(width + 2) // 8) * 8
    plain = weight.new_empty((outputs, padded), dtype=weight.dtype)
    scaled = weight.new_empty((outputs, padded), dtype=dtype)
    given = (bias, gamma, *((norm.weight, norm.bias) if turned else (None, None)))
    given = tuple(None if t is None else t.contiguous() for t in given)
    _fold_kernel[(triton.cdiv(outputs, FOLDED_ROWS),)](
        *(weight, *(plain if t is None else t for t in given), plain, scaled, outputs),
        WIDTH=width,
        PADDED=padded,
        HAS_BIAS=bias is not None,
        HAS_GAMMA=gamma is not None,
        TURNED=turned,
        HAS_NORM_BIAS=turned and norm.bias is not None,
        TILE_ROWS=FOLDED_ROWS,
        BLOCK=triton.next_power_of_2(padded),
        num_warps=4,
    )
    half = dtype != torch.float32
    factor = factor_of(plain, width - turned, dtype) if frozen and half else None
    return Folded(plain, scaled, matmul_fp32(plain.T, plain), factor, turned)


def project_calibrate(
    source: Tensor | Packed, p: Projection, beta: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`(out [N, D] in the source's dtype, mean squares [N / group_rows * groups] in fp32)`.

    Args:
        source: x `[N, d]`, or a payload's codes, which are unpacked on the way.
    """
    source = source.contiguous() if isinstance(source, Tensor) else source
    outputs = p.weight.shape[0]
    if not source.shape[0]:
        out = source.new_empty((0, outputs), dtype=source.dtype)
        return out, source.new_empty(0, dtype=torch.float32)
    if p.folded is None:
        x = normalised_rows(source, p.norm)[0]
        return Tiles(
            *(x, p.weight),
            bias=p.bias,
            gamma=p.gamma,
            beta=beta,
            calibration=p.calibration,
            tanh=p.tanh,
        ).forward()
    folded = p.folded
    rows, squares = scaled_rows(
        *(source, p.norm, p.calibration, folded.gram, folded.factor, outputs),
        turned=folded.turned,
    )
    if beta is None:
        return rows @ folded.scaled.T, squares
    return torch.addmm(beta.to(rows.dtype), rows, folded.scaled.T), squares
