"""The projection's gradients, from x and r2 alone (`projection` has the names).

Folded: with U = dout (gamma * P) `[N, K]` one matmul gives the pieces of <dout, gamma * y> as
<U, [x, 1]>, and

    w = <dout, gamma*y> / (count * (r2 + eps))    both summed over the count values that share r2
    dx = s (U - w G [x, 1])                        the second term is what calibration takes away
    A = dout' [s x, s, 1],  C = sum of w [x, 1] [s x, s]'
    d(W | b) = gamma * A - P C,   dgamma = rowsum(A * P),   dbeta = A's column of ones
    dgain = sum of <dout, gamma*y> s / gain

Two matmuls of N*D*K and two reads of dout in all; y's gradient is never written. LayerNorm's own
backward is torch's, on `[N, d]`.

Tiles: y's gradient dy `[N, D]` is made as `projection_tiles` says; two matmuls give those of x, W.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from latentwire_fast.kernels.matmul import matmul_fp32
from latentwire_fast.kernels.projection import Folded, Projection
from latentwire_fast.kernels.projection_pieces import (
    plain_tiling,
    row_moments,
    row_scale,
    row_tile,
    store_rows,
    store_tail,
)
from latentwire_fast.kernels.projection_rows import normalised_rows
from latentwire_fast.kernels.projection_tiles import Tiles

# Gradients, in the order in which they are asked for and returned.
X, WEIGHT, BIAS, NORM_WEIGHT, NORM_BIAS, GAMMA, BETA, GAIN = range(8)


@triton.jit(do_not_specialize=["rows", "rows_per_group"])
def _gradient_kernel(
    x_ptr, norm_weight_ptr, norm_bias_ptr, gain_ptr, along_ptr, squares_ptr, dots_ptr,
    scaled_ptr, weighted_ptr, mean_ptr, rstd_ptr,
    rows, rows_per_group, target_rms, eps, norm_eps,
    WRITE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, OUTPUTS: tl.constexpr,
    CALIBRATED: tl.constexpr, HAS_NORM: tl.constexpr, HAS_NORM_BIAS: tl.constexpr,
    HAS_GAIN: tl.constexpr, BLOCK: tl.constexpr, TILE_ROWS: tl.constexpr,
):  # fmt: skip
    """First `dots = <along, [x, 1]>` per row, and the moments; then, given the dots' sums per group
    of rows, the scaled and the weighted rows (WRITE)."""
    row = tl.program_id(0).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    live_row = row < rows
    column = tl.arange(0, BLOCK)
    mean = tl.zeros((TILE_ROWS,), tl.float32)
    rstd = mean
    if HAS_NORM:
        mean, rstd = row_moments(
            x_ptr, x_ptr, row, live_row, 1, 1, 1, norm_eps, WIDTH, 0, 1, TILE_ROWS, BLOCK
        )
        if not WRITE:
            tl.store(mean_ptr + row, mean, mask=live_row)
            tl.store(rstd_ptr + row, rstd, mask=live_row)
    x = row_tile(
        x_ptr, x_ptr, norm_weight_ptr, norm_bias_ptr, row, column, live_row, mean, rstd,
        1, 1, 1, WIDTH, 0, 1, HAS_NORM, HAS_NORM_BIAS,
    )  # fmt: skip
    if WRITE:
        square = tl.zeros((TILE_ROWS,), tl.float32)
        if CALIBRATED:
            group = row // rows_per_group
            square = tl.load(squares_ptr + group, mask=live_row, other=1.0)
            dots = tl.load(dots_ptr + group, mask=live_row, other=0.0)
            weight = dots / (1.0 * rows_per_group * OUTPUTS * (square + eps))
            store_rows(weighted_ptr, x * weight[:, None], row, column, live_row, WIDTH, PADDED)
            store_tail(weighted_ptr, weight, 0.0, row, live_row, WIDTH, PADDED)
        s = row_scale(square, gain_ptr, target_rms, eps, CALIBRATED, HAS_GAIN)
        store_rows(scaled_ptr, x * s[:, None], row, column, live_row, WIDTH, PADDED)
        store_tail(scaled_ptr, s, 1.0, row, live_row, WIDTH, PADDED)
    else:
        along = tl.load(
            along_ptr + row[:, None] * PADDED + column[None, :],
            mask=live_row[:, None] & (column < WIDTH)[None, :],
            other=0.0,
        )
        dots = tl.sum(x * along, 1)
        dots += tl.load(along_ptr + row * PADDED + WIDTH, mask=live_row, other=0.0)
        tl.store(dots_ptr + row, dots, mask=live_row)


def _unit_scale(p: Projection, squares: Tensor) -> Tensor | float:
    """s without the gain, per group of rows."""
    c = p.calibration
    return c.target_rms * (squares + c.eps).rsqrt() if c.group_rows else c.target_rms


class _Rows:
    """The launches of `_gradient_kernel` for one call."""

    def __init__(self, x: Tensor, p: Projection, folded: Folded) -> None:
        self.x, self.p, self.padded = x, p, folded.gram.shape[0]

    def _run(self, write: bool, tensors: tuple[Tensor | None, ...]) -> None:
        x, p, c = self.x, self.p, self.p.calibration
        tile_rows, block = plain_tiling(x.shape[1])
        _gradient_kernel[(triton.cdiv(x.shape[0], tile_rows),)](
            x, *(x if t is None else t for t in (p.norm.weight, p.norm.bias, c.gain, *tensors)),
            *(x.shape[0], max(c.group_rows, 1), c.target_rms, c.eps, p.norm.eps),
            WRITE=write,
            WIDTH=x.shape[1],
            PADDED=self.padded,
            OUTPUTS=p.weight.shape[0],
            CALIBRATED=c.group_rows > 0,
            HAS_NORM=p.norm.weight is not None,
            HAS_NORM_BIAS=p.norm.bias is not None,
            HAS_GAIN=c.gain is not None,
            BLOCK=block,
            TILE_ROWS=tile_rows,
            num_warps=4,
        )  # fmt: skip

    def dots(self, along: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """<dout, gamma*y> per row, and the rows' means and 1/deviations."""
        dots, mean, rstd = (along.new_empty(len(along), dtype=torch.float32) for _ in range(3))
        self._run(False, (along, None, dots, None, None, mean, rstd))
        return dots, mean, rstd

    def write(self, squares: Tensor, dots: Tensor) -> tuple[Tensor, Tensor]:
        """`[s x, s, 1]` and `w [x, 1]`. No bound keeps w in fp16's range: it is fp32 then."""
        x, shape = self.x, (self.x.shape[0], self.padded)
        wide = torch.float32 if x.dtype == torch.float16 else x.dtype
        scaled = x.new_empty(shape, dtype=x.dtype)
        weighted = x.new_empty(shape, dtype=wide)
        self._run(True, (None, squares, dots, scaled, weighted, None, None))
        return scaled, weighted


def _folded_gradients(
    grad: Tensor, x: Tensor, squares: Tensor, p: Projection, folded: Folded, needs: list[bool]
) -> list[Tensor | None]:
    found: list[Tensor | None] = [None] * len(needs)
    width, group_rows = x.shape[1], max(p.calibration.group_rows, 1)
    calibrated = p.calibration.group_rows > 0
    rows = _Rows(x, p, folded)
    along = matmul_fp32(grad, folded.scaled)
    dots, mean, rstd = rows.dots(along)
    dots = dots.view(-1, group_rows).sum(1)
    unit = _unit_scale(p, squares)
    if needs[GAIN]:
        found[GAIN] = (dots * unit).sum()
    scaled, weighted = rows.write(squares, dots)
    if needs[X] or needs[NORM_WEIGHT] or needs[NORM_BIAS]:
        if calibrated:
            along -= matmul_fp32(weighted, folded.gram.to(weighted.dtype))
        s = unit if p.calibration.gain is None else unit * p.calibration.gain.float()
        s = s[:, None].expand(-1, group_rows).reshape(-1, 1) if calibrated else s
        _norm_gradients(found, (along * s)[:, :width], x, mean, rstd, p)
    if any(needs[i] for i in (WEIGHT, BIAS, GAMMA, BETA)):
        outer = matmul_fp32(grad.T, scaled)
        plain = folded.plain.float()
        found[GAMMA] = (outer * plain).sum(1)
        found[BETA] = outer[:, width + 1]
        if p.gamma is not None:
            outer = outer * p.gamma.float()[:, None]
        if calibrated:
            taken = matmul_fp32(weighted.T, scaled.to(weighted.dtype))
            outer = torch.addmm(outer, plain, taken, alpha=-1)
        found[WEIGHT], found[BIAS] = outer[:, :width], outer[:, width]
    return found


def _tile_gradients(
    grad: Tensor, x: Tensor, squares: Tensor, p: Projection, needs: list[bool]
) -> list[Tensor | None]:
    found: list[Tensor | None] = [None] * len(needs)
    normed, mean, rstd = normalised_rows(x, p.norm)
    tiles = Tiles(
        *(normed, p.weight),
        bias=p.bias,
        gamma=p.gamma,
        beta=None,
        calibration=p.calibration,
        tanh=p.tanh,
    )
    dots = tiles.dots(grad) if p.calibration.group_rows or needs[GAIN] else None
    if dots is not None and needs[GAIN]:
        shares = dots * _unit_scale(p, squares)
        found[GAIN] = shares.view(-1, p.calibration.groups).sum(0).view(p.calibration.gain.shape)
    dy, found[GAMMA] = tiles.backward(grad, squares, dots)
    if needs[X] or needs[NORM_WEIGHT] or needs[NORM_BIAS]:
        d_normed = matmul_fp32(dy, tiles.weight.to(dy.dtype))
        _norm_gradients(found, d_normed, x, mean, rstd, p)
    if needs[WEIGHT]:
        found[WEIGHT] = matmul_fp32(dy.T, normed)
    if needs[BIAS]:
        found[BIAS] = dy.sum(0, dtype=torch.float32)
    if needs[BETA]:
        found[BETA] = grad.sum(0, dtype=torch.float32)
    return found


def _norm_gradients(
    found: list[Tensor | None], d_normed: Tensor, x: Tensor, mean: Tensor, rstd: Tensor,
    p: Projection,
) -> None:  # fmt: skip
    """From the gradient of the normalised rows to those of x and of LayerNorm's parameters."""
    found[X] = d_normed
    if p.norm.weight is not None:
        found[X], found[NORM_WEIGHT], found[NORM_BIAS] = torch.ops.aten.native_layer_norm_backward(
            *(d_normed.contiguous(), x.float(), [x.shape[1]], mean[:, None], rstd[:, None]),
            *(p.norm.weight.float(), p.norm.weight.float(), [True, True, True]),
        )


def project_calibrate_backward(
    grad: Tensor, x: Tensor, squares: Tensor, p: Projection, needs: list[bool]
) -> list[Tensor | None]:
    """fp32 gradients of x, weight, bias, norm_weight, norm_bias, gamma, beta, gain, if needed.

    Args:
        grad: `[N, D]`; x: `[N, d]`, N > 0; squares: the mean squares that forward returned.
    """
    x, grad, squares = x.contiguous(), grad.contiguous(), squares.contiguous()
    if p.folded is None:
        found = _tile_gradients(grad, x, squares, p, needs)
    else:
        found = _folded_gradients(grad, x, squares, p, p.folded, needs)
    wanted = zip(found, needs, strict=True)
    return [g.contiguous() if needed and g is not None else None for g, needed in wanted]
