"""The projection and all round it as tiles of `[N, D]`: where the Gram matrix does not serve.

y = f(W x + b), f 1 or tanh; r2 the mean of y^2; s = target_rms * gain / sqrt(r2 + eps). Four modes:

    SQUARES   each tile's row sums of y^2, [tiles, N]      forward, before
    WRITE     gamma * s * y + beta                         forward
    DOTS      each tile's row sums of v*y, v = gamma*dout  backward, before; column sums for dbeta
    GRADIENT  dy = s*v - y * s * sum(v*y) / (count * (r2 + eps)), times f'; column sums for dgamma
              and dbias (of dy before it is rounded)

The D columns may lie in groups, each with its own r2 and gain: a tile never holds columns of two.

y comes twice in each direction. Up to d = `RECOMPUTED` a tile of it is multiplied out each time, W
staying in L2; beyond, cuBLAS writes W x once and the modes read it. Multiplying again costs
2*N*D*d / F, writing and reading 2*N*D*e / BW: equal at d = e*F/BW, with 790 TFLOP/s and 4.3 TB/s
367 for bf16. At d = D = 4096 and N = 2048 (the MLP adapter) it is 87 us against 8.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from latentwire_fast.kernels.activations import tanh, tanh_approximate
from latentwire_fast.kernels.projection_rows import Calibration

RECOMPUTED = 256
# Tiles of 128 x 128 with K in steps of 64 and 8 warps: 64 accumulators per thread. fp32 rows, each
# of whose products is three of TF32, spill with more than half of that.
TILE_ROWS, TILE_COLUMNS, TILE_K = 128, 128, 64
NUM_WARPS, NUM_STAGES = 8, 3
# Of up to 32 rows with their products stored: nothing is multiplied, and taller tiles are empty.
FEW_ROWS, FEW_WARPS = 32, 4
# Row tiles that run next to each other, so that they share the columns' W in L2.
BAND = 8
SQUARES, WRITE, DOTS, GRADIENT = range(4)
# What f is.
IDENTITY, TANH, TANH_APPROXIMATE = range(3)


@triton.jit
def _product(
    x_ptr, weight_ptr, rows, row, column, live_column, INNER: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """W x of one tile, fp32."""
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
            mask=live_column[None, :] & inside[:, None],
            other=0.0,
        )
        y = tl.dot(x, weight.to(x.dtype), y, input_precision="tf32x3")
    return y


@triton.jit
def _column_values(ptr, column, live_column):
    """`[1, C]` fp32."""
    return tl.load(ptr + column, mask=live_column, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _mean_squares(
    parts_ptr, rows, row, tile, group_width: tl.constexpr, group_tiles: tl.constexpr,
    GROUP_ROWS: tl.constexpr, TILE_ROWS: tl.constexpr,
):  # fmt: skip
    """Of the rows `[R]`, from their sums by tiles of outputs, from number `tile` on."""
    sums = tl.zeros((TILE_ROWS,), tl.float32)
    for part in range(group_tiles):
        place = (tile + part) * rows.to(tl.int64) + row
        sums += tl.load(parts_ptr + place, mask=row < rows, other=0.0)
    if GROUP_ROWS > 1:
        of_groups = tl.sum(tl.reshape(sums, (TILE_ROWS // GROUP_ROWS, GROUP_ROWS)), 1)
        spread = tl.broadcast_to(of_groups[:, None], (TILE_ROWS // GROUP_ROWS, GROUP_ROWS))
        sums = tl.reshape(spread, (TILE_ROWS,))
    return sums / (GROUP_ROWS * group_width)


@triton.jit
def _position(
    rows, WIDTH: tl.constexpr, GROUPS: tl.constexpr, group_width: tl.constexpr,
    group_tiles: tl.constexpr, BAND: tl.constexpr, TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    """A program's tile: (number among row tiles, among column tiles; group of its columns; columns
    `[C]`, and which of them there are)."""
    column_tiles: tl.constexpr = GROUPS * group_tiles
    program = tl.program_id(0)
    band = program // (BAND * column_tiles)
    height = tl.minimum(tl.cdiv(rows, TILE_ROWS) - band * BAND, BAND)
    row_tile = band * BAND + program % (BAND * column_tiles) % height
    column_tile = program % (BAND * column_tiles) // height
    if GROUPS == 1:
        column_group = 0
        column = column_tile * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
        live_column = column < WIDTH
    else:
        column_group = column_tile // group_tiles
        inner = column_tile % group_tiles * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
        column = column_group * group_width + inner
        live_column = inner < group_width
    return row_tile, column_tile, column_group, column, live_column


@triton.jit
def _activated(y, ACTIVATION: tl.constexpr):
    if ACTIVATION == 1:
        y = tanh(y)
    elif ACTIVATION == 2:
        y = tanh_approximate(y)
    return y


@triton.jit(do_not_specialize=["rows", "rows_per_group"])
def _tiles_kernel(
    x_ptr, weight_ptr, y_ptr, bias_ptr, gamma_ptr, beta_ptr, gain_ptr, squares_ptr, dots_ptr,
    grad_ptr, out_ptr, columns_ptr, rows, rows_per_group, target_rms, eps,
    MODE: tl.constexpr, INNER: tl.constexpr, WIDTH: tl.constexpr, HAS_Y: tl.constexpr,
    CALIBRATED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GAMMA: tl.constexpr,
    HAS_BETA: tl.constexpr, HAS_GAIN: tl.constexpr, ACTIVATION: tl.constexpr,
    GROUPS: tl.constexpr, GROUP_ROWS: tl.constexpr, BAND: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """Modes SQUARES 0, WRITE 1, DOTS 2, GRADIENT 3 of the module's docstring.

    GROUP_ROWS: in mode WRITE, rows that share a mean square, if `dots` holds the tiles' sums of
    squares still: then a program adds up those of its rows, and stores the mean squares.
    """
    group_width: tl.constexpr = WIDTH // GROUPS
    group_tiles: tl.constexpr = (group_width + TILE_COLUMNS - 1) // TILE_COLUMNS
    row_tile, column_tile, column_group, column, live_column = _position(
        rows, WIDTH, GROUPS, group_width, group_tiles, BAND, TILE_ROWS, TILE_COLUMNS
    )
    row = row_tile * TILE_ROWS + tl.arange(0, TILE_ROWS)
    live = (row < rows)[:, None] & live_column[None, :]
    place = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    if HAS_Y:
        y = tl.load(y_ptr + place, mask=live, other=0.0).to(tl.float32)
    else:
        y = _product(
            x_ptr, weight_ptr, rows, row, column, live_column, INNER, TILE_ROWS, TILE_COLUMNS,
            TILE_K,
        )  # fmt: skip
    if HAS_BIAS:
        y += _column_values(bias_ptr, column, live_column)
    y = _activated(y, ACTIVATION)
    if MODE == 0:
        sums = tl.sum(tl.where(live_column[None, :], y * y, 0.0), 1)
        tl.store(out_ptr + column_tile.to(tl.int64) * rows + row, sums, mask=row < rows)
        return
    gamma = 1.0
    if HAS_GAMMA:
        gamma = _column_values(gamma_ptr, column, live_column)
    if MODE != 1:
        dout = tl.load(grad_ptr + place, mask=live, other=0.0).to(tl.float32)
    if MODE == 2:
        columns_ptr += row_tile.to(tl.int64) * WIDTH
        tl.store(columns_ptr + column, tl.sum(dout, 0), mask=live_column)
        sums = tl.sum(dout * gamma * y, 1)
        tl.store(out_ptr + column_tile.to(tl.int64) * rows + row, sums, mask=row < rows)
        return
    group = row // rows_per_group * GROUPS + column_group  # of values that share a mean square
    s = tl.full((TILE_ROWS,), 1.0, tl.float32) * target_rms
    if HAS_GAIN:
        s *= tl.load(gain_ptr + column_group).to(tl.float32)
    damped = tl.full((TILE_ROWS,), 1.0, tl.float32)
    if CALIBRATED:
        if GROUP_ROWS > 0:
            square = _mean_squares(
                dots_ptr, rows, row, column_group * group_tiles, group_width, group_tiles,
                GROUP_ROWS, TILE_ROWS,
            )  # fmt: skip
            first = (column_tile % group_tiles == 0) & (row % GROUP_ROWS == 0) & (row < rows)
            tl.store(squares_ptr + group, square, mask=first)
        else:
            square = tl.load(squares_ptr + group, mask=row < rows, other=1.0)
        damped = square + eps
        s /= tl.sqrt(damped)
    if MODE == 1:
        out = y * s[:, None] * gamma
        if HAS_BETA:
            out += _column_values(beta_ptr, column, live_column)
        tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=live)
    else:
        # Sums first, while little else is in registers. Rows that there are not have a gradient
        # of 0.
        columns_ptr += row_tile.to(tl.int64) * (2 * WIDTH)
        tl.store(columns_ptr + column, tl.sum(dout * y * s[:, None], 0), mask=live_column)
        dy = dout * gamma * s[:, None]
        if CALIBRATED:
            along = tl.load(dots_ptr + group, mask=row < rows, other=0.0)
            count = 1.0 * rows_per_group * group_width
            dy -= y * (s * along / (count * damped))[:, None]
        if ACTIVATION != 0:
            dy *= 1.0 - y * y
        tl.store(columns_ptr + WIDTH + column, tl.sum(dy, 0), mask=live_column)
        tl.store(out_ptr + place, dy.to(out_ptr.dtype.element_ty), mask=live)


def tile_columns(dtype: torch.dtype, *, width: int, groups: int) -> int:
    """Of rows of this dtype; fewer where a group of outputs is narrower."""
    most = TILE_COLUMNS // 2 if dtype == torch.float32 else TILE_COLUMNS
    if groups == 1:
        return most
    return min(most, max(16, triton.next_power_of_2(width // groups)))


def activation(dtype: torch.dtype, *, tanh: bool) -> int:
    """Of rows of this dtype; the interpreter has the exact one alone."""
    if not tanh:
        return IDENTITY
    exact = dtype == torch.float32 or triton.knobs.runtime.interpret
    return TANH if exact else TANH_APPROXIMATE


class Tiles:
    """The arguments that every mode of one call shares.

    Args:
        x: `[N, d]`, normalised; weight: `[D, d]`; bias, gamma, beta: `[D]`.
    """

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        *,
        bias: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        calibration: Calibration,
        tanh: bool,
    ) -> None:
        self.x, self.weight = x, weight
        self.bias, self.gamma, self.beta = bias, gamma, beta
        self.calibration = calibration
        self.tanh = tanh
        self.rows, self.width = x.shape[0], weight.shape[0]
        wide = x.shape[1] > RECOMPUTED
        few = wide and self.rows <= FEW_ROWS
        self.tile_rows, self.warps = (FEW_ROWS, FEW_WARPS) if few else (TILE_ROWS, NUM_WARPS)
        self.row_tiles = triton.cdiv(self.rows, self.tile_rows)
        groups = calibration.groups
        self.columns = tile_columns(x.dtype, width=self.width, groups=groups)
        self.column_tiles = groups * triton.cdiv(self.width // groups, self.columns)
        self.product = x @ self.weight.to(x.dtype).T if wide else None

    def _run(
        self,
        mode: int,
        out: Tensor,
        *,
        squares: Tensor | None = None,
        dots: Tensor | None = None,
        grad: Tensor | None = None,
        columns: Tensor | None = None,
        group_rows: int = 0,
    ) -> None:
        """One launch. For an absent tensor x is passed, and not touched."""
        c, absent = self.calibration, self.x
        tensors = (self.product, self.bias, self.gamma, self.beta, c.gain, squares, dots, grad)
        _tiles_kernel[(self.row_tiles * self.column_tiles,)](
            *(self.x, self.weight, *(absent if t is None else t for t in tensors)),
            *(out, absent if columns is None else columns),
            *(self.rows, max(c.group_rows, 1), c.target_rms, c.eps),
            MODE=mode,
            INNER=self.x.shape[1],
            WIDTH=self.width,
            HAS_Y=self.product is not None,
            CALIBRATED=c.group_rows > 0,
            HAS_BIAS=self.bias is not None,
            HAS_GAMMA=self.gamma is not None,
            HAS_BETA=self.beta is not None,
            HAS_GAIN=c.gain is not None,
            ACTIVATION=activation(self.x.dtype, tanh=self.tanh),
            GROUPS=c.groups,
            GROUP_ROWS=group_rows,
            BAND=BAND,
            TILE_ROWS=self.tile_rows,
            TILE_COLUMNS=self.columns,
            TILE_K=TILE_K,
            num_warps=self.warps,
            num_stages=NUM_STAGES,
        )

    def _parts(
        self, mode: int, *, grad: Tensor | None = None, columns: Tensor | None = None
    ) -> Tensor:
        """Each tile's row sums `[tiles, N]`, which mode SQUARES or DOTS makes."""
        parts = self.x.new_empty((self.column_tiles, self.rows), dtype=torch.float32)
        self._run(mode, parts, grad=grad, columns=columns)
        return parts

    def _group_sums(self, parts: Tensor) -> Tensor:
        """Their sums per group of rows and, within it, of outputs."""
        groups, group_rows = self.calibration.groups, max(self.calibration.group_rows, 1)
        sums = parts.view(groups, -1, self.rows // group_rows, group_rows).sum((1, 3))
        return sums.T.contiguous().view(-1)

    def _result(self) -> Tensor:
        """Where the last mode writes: a tile of W x is read by the program that replaces it."""
        if self.product is not None:
            return self.product
        return self.x.new_empty((self.rows, self.width), dtype=self.x.dtype)

    def forward(self) -> tuple[Tensor, Tensor]:
        """gamma * s * y + beta `[N, D]` in x's dtype, and the mean squares (none uncalibrated)."""
        squares = self.x.new_empty(0, dtype=torch.float32)
        c, parts, added = self.calibration, None, 0
        if c.group_rows:
            parts = self._parts(SQUARES)
            if self.tile_rows % c.group_rows == 0:  # the writing program has all it needs
                added = c.group_rows
                count = self.rows // c.group_rows * c.groups
                squares = self.x.new_empty(count, dtype=torch.float32)
            else:
                squares = self._group_sums(parts) / (c.group_rows * self.width // c.groups)
        out = self._result()
        self._run(WRITE, out, squares=squares, dots=parts if added else None, group_rows=added)
        return out, squares

    def dots(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """<gamma * grad, y> summed over the values that share a mean square (per row without), and
        beta's gradient `[D]` in fp32."""
        columns = self.x.new_empty((self.row_tiles, self.width), dtype=torch.float32)
        parts = self._parts(DOTS, grad=grad, columns=columns)
        return self._group_sums(parts), columns.sum(0)

    def backward(
        self, grad: Tensor, squares: Tensor, dots: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradient of W x `[N, D]` in x's dtype; gamma's and the bias' `[D]` in fp32."""
        dy = self._result()
        columns = self.x.new_empty((self.row_tiles, 2, self.width), dtype=torch.float32)
        self._run(GRADIENT, dy, squares=squares, dots=dots, grad=grad, columns=columns)
        gamma, bias = columns.sum(0).unbind()
        return dy, gamma, bias
