"""Projection and RMS calibration: `gamma * s * y + beta`, `y = f(W norm(x) + b)`, f 1 or tanh.

s = target_rms * gain / sqrt(r2 + eps), r2 the mean square of y over a token, an example or the
batch.

s needs r2, and r2 needs all of a row's y. Writing y (N x D, the large tensor) to read it again
would double the traffic, so the projection is computed twice instead: the inner width d is short,
and W, which stays in L2, is all that is read again. One tile kernel in four modes:

    SQUARES   each tile's row sums of y^2, [tiles, N]     forward, before
    WRITE     gamma * s * y + beta                         forward
    DOTS      each tile's row sums of v*y, v = gamma*dout  backward, before
    GRADIENT  dy = s*v - y * s * sum(v*y) / (count * (r2 + eps)), times f'; column sums for dgamma

and the gradients of x and W are matmuls of dy. Saved for backward: x and r2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tiles of 128 x 128 with K in steps of 64 and 8 warps: 64 accumulators per thread.
TILE_ROWS, TILE_COLUMNS, TILE_K = 128, 128, 64
NUM_WARPS, NUM_STAGES = 8, 3
# Row tiles that run next to each other, so that they share the columns' W in L2.
BAND = 8
SQUARES, WRITE, DOTS, GRADIENT = 0, 1, 2, 3


@triton.jit
def _layer_norm_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, mean_ptr, rstd_ptr, eps,
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    x = tl.load(x_ptr + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, 0) / WIDTH
    centred = tl.where(inside, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / WIDTH + eps)
    out = centred * rstd * tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        out += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * WIDTH + column, out.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def _project_tile(
    x_ptr, weight_ptr, bias_ptr, rows, row, column,
    INNER: tl.constexpr, WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, TANH: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """y of one tile, fp32."""
    y = tl.zeros((TILE_ROWS, TILE_COLUMNS), tl.float32)
    k = tl.arange(0, TILE_K)
    x_rows = x_ptr + row.to(tl.int64)[:, None] * INNER
    weight_rows = weight_ptr + column.to(tl.int64)[None, :] * INNER
    for start in range(0, INNER, TILE_K):
        inside = start + k < INNER
        x = tl.load(
            x_rows + (start + k)[None, :], mask=(row < rows)[:, None] & inside[None, :], other=0.0
        )
        weight = tl.load(
            weight_rows + (start + k)[:, None],
            mask=(column < WIDTH)[None, :] & inside[:, None],
            other=0.0,
        )
        y = tl.dot(x, weight.to(x.dtype), y, input_precision="tf32x3")
    if HAS_BIAS:
        y += tl.load(bias_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
    if TANH:
        y = 2.0 * tl.sigmoid(2.0 * y) - 1.0
    return y


@triton.jit
def _project_kernel(
    x_ptr, weight_ptr, bias_ptr, gamma_ptr, beta_ptr, gain_ptr, squares_ptr, dots_ptr,
    grad_ptr, out_ptr, columns_ptr, rows, rows_per_group, target_rms, eps,
    MODE: tl.constexpr, INNER: tl.constexpr, WIDTH: tl.constexpr, CALIBRATED: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_GAMMA: tl.constexpr, HAS_BETA: tl.constexpr,
    HAS_GAIN: tl.constexpr, TANH: tl.constexpr, BAND: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """Modes SQUARES 0, WRITE 1, DOTS 2, GRADIENT 3 of the module's docstring."""
    row_tiles = tl.cdiv(rows, TILE_ROWS)
    column_tiles: tl.constexpr = (WIDTH + TILE_COLUMNS - 1) // TILE_COLUMNS
    program = tl.program_id(0)
    band = program // (BAND * column_tiles)
    height = tl.minimum(row_tiles - band * BAND, BAND)
    row_tile = band * BAND + program % (BAND * column_tiles) % height
    column_tile = program % (BAND * column_tiles) // height
    row = row_tile * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = column_tile * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    y = _project_tile(
        x_ptr, weight_ptr, bias_ptr, rows, row, column, INNER, WIDTH, HAS_BIAS, TANH,
        TILE_ROWS, TILE_COLUMNS, TILE_K,
    )  # fmt: skip
    live = (row < rows)[:, None] & (column < WIDTH)[None, :]
    place = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    if MODE == 0:
        sums = tl.sum(tl.where(column[None, :] < WIDTH, y * y, 0.0), 1)
        tl.store(out_ptr + column_tile.to(tl.int64) * rows + row, sums, mask=row < rows)
        return
    gamma = 1.0
    if HAS_GAMMA:
        gamma = tl.load(gamma_ptr + column, mask=column < WIDTH, other=0.0)
        gamma = gamma.to(tl.float32)[None, :]
    if MODE != 1:
        dout = tl.load(grad_ptr + place, mask=live, other=0.0).to(tl.float32)
    if MODE == 2:
        sums = tl.sum(dout * gamma * y, 1)
        tl.store(out_ptr + column_tile.to(tl.int64) * rows + row, sums, mask=row < rows)
        return
    group = row // rows_per_group
    s = tl.full((TILE_ROWS,), 1.0, tl.float32) * target_rms
    if HAS_GAIN:
        s *= tl.load(gain_ptr).to(tl.float32)
    damped = tl.full((TILE_ROWS,), 1.0, tl.float32)
    if CALIBRATED:
        damped = tl.load(squares_ptr + group, mask=row < rows, other=1.0) + eps
        s /= tl.sqrt(damped)
    if MODE == 1:
        out = y * s[:, None] * gamma
        if HAS_BETA:
            beta = tl.load(beta_ptr + column, mask=column < WIDTH, other=0.0)
            out += beta.to(tl.float32)[None, :]
        tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=live)
    else:
        dy = dout * gamma * s[:, None]
        if CALIBRATED:
            along = tl.load(dots_ptr + group, mask=row < rows, other=0.0)
            count = 1.0 * rows_per_group * WIDTH
            dy -= y * (s * along / (count * damped))[:, None]
        if TANH:
            dy *= 1.0 - y * y
        tl.store(out_ptr + place, dy.to(out_ptr.dtype.element_ty), mask=live)
        sums = tl.sum(dout * y * s[:, None], 0)
        tl.store(columns_ptr + row_tile.to(tl.int64) * WIDTH + column, sums, mask=column < WIDTH)


def _layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The normalised rows in x's dtype, and their means and 1/deviations in fp32; one launch."""
    rows, width = x.shape
    out = torch.empty_like(x)
    mean, rstd = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
    block = triton.next_power_of_2(width)
    _layer_norm_kernel[(rows,)](
        *(x, weight, x if bias is None else bias, out, mean, rstd, eps),
        *(width, bias is not None, block),
        num_warps=max(1, min(8, block // 256)),
    )
    return out, mean, rstd


def _matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b`, accumulated and returned in fp32."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


class _Projection:
    """The arguments that every mode of one call shares."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        gain: Tensor | None,
        target_rms: float,
        eps: float,
        group_rows: int,
        tanh: bool,
    ) -> None:
        self.x, self.weight = x, weight.contiguous()
        self.optional = (bias, gamma, beta, gain)
        self.target_rms, self.eps = target_rms, eps
        # Rows that share a mean square; 0 without calibration.
        self.group_rows = group_rows
        self.tanh = tanh
        self.rows, self.width = x.shape[0], weight.shape[0]
        self.row_tiles = triton.cdiv(self.rows, TILE_ROWS)
        self.column_tiles = triton.cdiv(self.width, TILE_COLUMNS)

    def run(
        self,
        mode: int,
        out: Tensor,
        *,
        squares: Tensor | None = None,
        dots: Tensor | None = None,
        grad: Tensor | None = None,
        columns: Tensor | None = None,
    ) -> None:
        """One launch. Absent tensors are passed as x, which that mode does not touch."""
        absent = self.x
        bias, gamma, beta, gain = self.optional
        tensors = (bias, gamma, beta, gain, squares, dots, grad)
        _project_kernel[(self.row_tiles * self.column_tiles,)](
            *(self.x, self.weight, *(absent if t is None else t for t in tensors)),
            *(out, absent if columns is None else columns),
            *(self.rows, max(self.group_rows, 1), self.target_rms, self.eps),
            MODE=mode,
            INNER=self.x.shape[1],
            WIDTH=self.width,
            CALIBRATED=self.group_rows > 0,
            HAS_BIAS=bias is not None,
            HAS_GAMMA=gamma is not None,
            HAS_BETA=beta is not None,
            HAS_GAIN=gain is not None,
            TANH=self.tanh,
            BAND=BAND,
            TILE_ROWS=TILE_ROWS,
            TILE_COLUMNS=TILE_COLUMNS,
            TILE_K=TILE_K,
            num_warps=NUM_WARPS,
            num_stages=NUM_STAGES,
        )

    def group_sums(self, mode: int, *, grad: Tensor | None = None) -> Tensor:
        """Per group of rows, the sum over its values that mode SQUARES or DOTS makes."""
        parts = self.x.new_empty((self.column_tiles, self.rows), dtype=torch.float32)
        self.run(mode, parts, grad=grad)
        return parts.view(self.column_tiles, -1, max(self.group_rows, 1)).sum((0, 2))


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
    *,
    group_rows: int,
    tanh: bool,
    norm_eps: float,
    rms_eps: float,
) -> tuple[Tensor, Tensor]:
    """`(out [N, D] in x's dtype, mean squares [N / group_rows] in fp32)` of x `[N, d]`.

    Args:
        group_rows: rows that share a mean square; 0: no calibration, no mean squares.
    """
    x = x.contiguous()
    out = x.new_empty((x.shape[0], weight.shape[0]))
    squares = x.new_empty(0, dtype=torch.float32)
    if not x.shape[0]:
        return out, squares
    normed = x if norm_weight is None else _layer_norm(x, norm_weight, norm_bias, norm_eps)[0]
    projection = _Projection(
        normed, weight, bias, gamma, beta, gain, target_rms, rms_eps, group_rows, tanh
    )
    if group_rows:
        squares = projection.group_sums(SQUARES) / (group_rows * projection.width)
    projection.run(WRITE, out, squares=squares)
    return out, squares


def project_calibrate_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    gamma: Tensor | None,
    gain: Tensor | None,
    squares: Tensor,
    target_rms: float,
    *,
    group_rows: int,
    tanh: bool,
    norm_eps: float,
    rms_eps: float,
    needs: list[bool],
) -> list[Tensor | None]:
    """fp32 gradients of x, weight, bias, norm_weight, norm_bias, gamma, beta, gain, if needed."""
    x, grad, squares = x.contiguous(), grad.contiguous(), squares.contiguous()
    normed, mean, rstd = x, x, x
    if norm_weight is not None:
        normed, mean, rstd = _layer_norm(x, norm_weight, norm_bias, norm_eps)
    projection = _Projection(
        normed, weight, bias, gamma, None, gain, target_rms, rms_eps, group_rows, tanh
    )
    dots = d_gain = None
    if group_rows or needs[7]:
        dots = projection.group_sums(DOTS, grad=grad)
    if needs[7] and dots is not None:
        unit = target_rms * (squares + rms_eps).rsqrt() if group_rows else target_rms
        d_gain = (dots * unit).sum()
    dy = x.new_empty((projection.rows, projection.width))
    columns = dy.new_empty((projection.row_tiles, projection.width), dtype=torch.float32)
    projection.run(GRADIENT, dy, squares=squares, dots=dots, grad=grad, columns=columns)
    d_norm_weight = d_norm_bias = d_x = None
    if needs[0] or needs[3] or needs[4]:
        d_x = _matmul_fp32(dy, projection.weight.to(dy.dtype))
    if norm_weight is not None and d_x is not None:
        d_x, d_norm_weight, d_norm_bias = torch.ops.aten.native_layer_norm_backward(
            *(d_x, x.float(), [x.shape[1]], mean[:, None], rstd[:, None]),
            *(norm_weight.float(), norm_weight.float(), [True, True, True]),
        )
    return [
        d_x if needs[0] else None,
        _matmul_fp32(dy.T, normed) if needs[1] else None,
        dy.sum(0, dtype=torch.float32) if needs[2] else None,
        d_norm_weight if needs[3] else None,
        d_norm_bias if needs[4] else None,
        columns.sum(0) if needs[5] else None,
        grad.sum(0, dtype=torch.float32) if needs[6] else None,
        d_gain,
    ]
