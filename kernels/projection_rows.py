"""Rows on their way into the projection: unpacked, normalised, calibrated by a Gram matrix, scaled.

Names: x `[N, d]` the rows after LayerNorm; D outputs; K = d + 2 rounded up to 8, the padded width.

A kernel reads the rows, or unpacks a payload's codes; normalises them; finds s; and writes
[s x, s, 1, 0 ...] `[N, K]` for the one matmul left, or x itself for `projection_tiles`.

Half precision rows of up to 512 values go to `projection_halves` for the same. Here fp32 rows are
computed as exactly as fp32 is.

r2 = (x'Gx + 2 c'x + b'b) / D needs G `[d, d]`, which is tiled in both directions: held whole it
does not fit the registers. G is symmetric, so only the tiles on and above its diagonal are read,
those above counted twice. A tile of x is read (and unpacked) again for each tile of G that it
meets: rows are short and stay in L1, and keeping them in registers as matmul operands spills.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from latentwire_fast.kernels.projection_halves import (
    STAGES,
    WIDEST,
    Factor,
    _half_rows_kernel,
    half_tiling,
    most_rows,
)
from latentwire_fast.kernels.projection_pieces import (
    plain_tiling,
    row_moments,
    row_scale,
    row_tile,
    store_rows,
    store_tail,
)

# Arguments whose divisibility is worth no compilation: no address is a multiple of one.
SIZES = ["rows", "span", "rows_per_group", "latents", "code_bytes", "groups"]
# What a launch of `_rows_kernel` makes.
PLAIN, CONSTANT, ROW, PROGRAM, SQUARES, GIVEN = range(6)
# Columns of a tile, of x and of the Gram matrix, whose tiles are [TILE_K, TILE]. With 64 x 64 the
# operands spill. Unpacking takes registers too, and has 8 warps: a thread's 16 bytes of half
# precision, times those, are a tile.
TILE, TILE_K = 64, 32
PACKED_VALUES, PACKED_WARPS = 2048, 8
# Programs own 16 rows while those do not fill an H100's or H200's 132 SMs, 64 after that. An
# example of up to 64 is one program, and its calibration one launch.
LARGEST_TILE = 64
FEW_ROWS = 16 * 132


@dataclass(frozen=True)
class Packed:
    """Rows as `quantize_pack` packs them: `latents` rows of `width` values have codes together.

    codes `[B, code_bytes]` uint8, scales `[B, groups]` fp16; `dtype` is what is computed with.
    """

    codes: Tensor
    scales: Tensor
    bits: int
    group_size: int
    latents: int
    width: int
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0] * self.latents, self.width

    @property
    def new_empty(self) -> Callable[..., Tensor]:
        return self.codes.new_empty


@dataclass(frozen=True)
class Norm:
    """LayerNorm's parameters `[d]`; without a weight there is no LayerNorm."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float


@dataclass(frozen=True)
class Calibration:
    """`s = target_rms * gain / sqrt(r2 + eps)`; without a group's rows `s = target_rms * gain`."""

    gain: Tensor | None
    target_rms: float
    eps: float
    # Rows that share a mean square; 0 without calibration.
    group_rows: int
    # Groups of outputs, each with its mean squares and its gain: more than one is for tiles.
    groups: int = 1


@triton.jit
def _gram_squares(
    x_ptr, scales_ptr, norm_weight_ptr, norm_bias_ptr, gram_ptr, row, live_row, mean, rstd,
    latents, code_bytes, groups, WIDTH: tl.constexpr, PADDED: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr, HAS_NORM: tl.constexpr, HAS_NORM_BIAS: tl.constexpr,
    PRECISION: tl.constexpr, TILE_ROWS: tl.constexpr, TILE: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """Sums of squares `[R]` of W x + b: x'Gx by the tiles of G on and above its diagonal, and the
    bias' 2 c'x + b'b from G's row d."""
    square = tl.zeros((TILE_ROWS,), tl.float32)
    for j in range(0, WIDTH, TILE):
        column_j = j + tl.arange(0, TILE)
        inside_j = column_j < WIDTH
        gram_j = gram_ptr + column_j[None, :] * PADDED
        cross = tl.zeros((TILE_ROWS, TILE), tl.float32)
        for k in range(0, j + TILE, TILE_K):
            column_k = k + tl.arange(0, TILE_K)
            x_k = row_tile(
                x_ptr, scales_ptr, norm_weight_ptr, norm_bias_ptr, row, column_k, live_row, mean,
                rstd, latents, code_bytes, groups, WIDTH, BITS, GROUP, HAS_NORM, HAS_NORM_BIAS,
            )  # fmt: skip
            inside = inside_j[None, :] & (column_k < WIDTH)[:, None]
            gram = tl.load(gram_j + column_k[:, None], mask=inside, other=0.0)
            x_k *= tl.where(k < j, 2.0, 1.0)
            cross = tl.dot(x_k, gram, cross, input_precision=PRECISION)
        x_j = row_tile(
            x_ptr, scales_ptr, norm_weight_ptr, norm_bias_ptr, row, column_j, live_row, mean, rstd,
            latents, code_bytes, groups, WIDTH, BITS, GROUP, HAS_NORM, HAS_NORM_BIAS,
        )  # fmt: skip
        bias = tl.load(gram_ptr + WIDTH * PADDED + column_j, mask=inside_j, other=0.0)
        square += tl.sum((cross + 2.0 * bias[None, :]) * x_j, 1)
    square += tl.load(gram_ptr + WIDTH * PADDED + WIDTH)
    # Rounding may leave less where W x and b cancel. No maximum: that drops NaN.
    return tl.where(square < 0, 0.0, square)


@triton.jit(do_not_specialize=SIZES)
def _rows_kernel(
    x_ptr, scales_ptr, norm_weight_ptr, norm_bias_ptr, gram_ptr, gain_ptr,
    squares_ptr, out_ptr, mean_ptr, rstd_ptr,
    rows, span, rows_per_group, latents, code_bytes, groups, target_rms, eps, norm_eps,
    MODE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, OUTPUTS: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, HAS_NORM: tl.constexpr,
    HAS_NORM_BIAS: tl.constexpr, HAS_GAIN: tl.constexpr,
    PRECISION: tl.constexpr, TILE_ROWS: tl.constexpr, TILE: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """A program owns `span` rows. MODE says what it makes.

    0 PLAIN: x and its moments. The others scaled rows: 1 CONSTANT, without calibration; 2 ROW, each
    by its own mean square; 3 PROGRAM, all by the program's; 4 SQUARES: the rows' mean squares, and
    no rows; 5 GIVEN: by mean squares of `rows_per_group` rows each, made before.
    """
    program = tl.program_id(0).to(tl.int64)
    local = tl.arange(0, TILE_ROWS)
    row = program * span + local
    live_row = (local < span) & (row < rows)
    mean = tl.zeros((TILE_ROWS,), tl.float32)
    rstd = mean
    if HAS_NORM:
        mean, rstd = row_moments(
            x_ptr, scales_ptr, row, live_row, latents, code_bytes, groups, norm_eps, WIDTH, BITS,
            GROUP, TILE_ROWS, TILE,
        )  # fmt: skip
        if MODE == 0:
            tl.store(mean_ptr + row, mean, mask=live_row)
            tl.store(rstd_ptr + row, rstd, mask=live_row)
    square = tl.zeros((TILE_ROWS,), tl.float32)
    if (MODE >= 2) & (MODE <= 4):
        square = _gram_squares(
            x_ptr, scales_ptr, norm_weight_ptr, norm_bias_ptr, gram_ptr, row, live_row, mean, rstd,
            latents, code_bytes, groups, WIDTH, PADDED, BITS, GROUP, HAS_NORM, HAS_NORM_BIAS,
            PRECISION, TILE_ROWS, TILE, TILE_K,
        )  # fmt: skip
        square /= OUTPUTS
        if MODE == 3:
            held = tl.minimum(rows - program * span, span)
            mean_square = tl.sum(tl.where(live_row, square, 0.0), 0) / held
            tl.store(squares_ptr + program, mean_square)
            square = tl.zeros_like(square) + mean_square
        else:
            tl.store(squares_ptr + row, square, mask=live_row)
    if MODE == 5:
        square = tl.load(squares_ptr + row // rows_per_group, mask=live_row, other=1.0)
    if MODE != 4:
        s = tl.full((TILE_ROWS,), 1.0, tl.float32)
        if MODE != 0:
            s = row_scale(square, gain_ptr, target_rms, eps, MODE != 1, HAS_GAIN)
        for start in range(0, WIDTH, TILE):
            part = start + tl.arange(0, TILE)
            x = row_tile(
                x_ptr, scales_ptr, norm_weight_ptr, norm_bias_ptr, row, part, live_row, mean, rstd,
                latents, code_bytes, groups, WIDTH, BITS, GROUP, HAS_NORM, HAS_NORM_BIAS,
            )  # fmt: skip
            store_rows(out_ptr, x * s[:, None], row, part, live_row, WIDTH, PADDED)
        if MODE != 0:
            store_tail(out_ptr, s, 1.0, row, live_row, WIDTH, PADDED)


def is_half(source: Tensor | Packed, norm: Norm) -> bool:
    """Whether `projection_halves` takes these rows: not a payload's that may be beyond fp16."""
    bounded = isinstance(source, Tensor) or norm.weight is not None
    fits = source.dtype == torch.bfloat16 or (source.dtype == torch.float16 and bounded)
    return fits and source.shape[1] <= WIDEST


@dataclass(frozen=True)
class Tiling:
    """Rows and columns of a tile, and the rows that a program owns."""

    rows: int
    columns: int
    span: int

    @classmethod
    def of(cls, rows: int, group_rows: int, *, packed: bool, most: int = LARGEST_TILE) -> Tiling:
        """A mean square's rows, if they fit one tile of at most so many."""
        few = 1 < group_rows <= most
        if few:
            tile_rows = max(16, triton.next_power_of_2(group_rows))
        else:
            tile_rows = 16 if rows <= FEW_ROWS else most
        columns = PACKED_VALUES // tile_rows if packed else TILE
        return cls(tile_rows, columns, group_rows if few else tile_rows)

    def warps(self, *, packed: bool) -> int:
        if packed:
            return PACKED_WARPS
        return 8 if self.rows == LARGEST_TILE else 4


@dataclass(frozen=True)
class _Launch:
    """What the launches of one call share. For an absent tensor `out` is passed, and not touched.

    gram, turned: of `scaled_rows`; factor: in the Gram matrix's place for half precision rows.
    """

    source: Tensor | Packed
    norm: Norm
    calibration: Calibration
    tiling: Tiling
    out: Tensor
    gram: Tensor | None = None
    factor: Factor | None = None
    turned: bool = False
    outputs: int = 1

    def run(
        self,
        mode: int,
        *,
        squares: Tensor | None = None,
        moments: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        out, (rows, width) = self.out, self.source.shape
        packed = self.source if isinstance(self.source, Packed) else None
        x = self.source.codes if isinstance(self.source, Packed) else self.source
        half = is_half(self.source, self.norm)
        factor = (self.factor.matrix, self.factor.constants) if self.factor else (None, None)
        tensors = (
            *(packed.scales if packed else None, self.norm.weight, self.norm.bias, self.gram),
            *(*(factor if half else ()), self.calibration.gain, squares),
        )
        constants = {
            "MODE": mode,
            "WIDTH": width,
            "PADDED": out.shape[1],
            "OUTPUTS": self.outputs,
            "BITS": packed.bits if packed else 0,
            "GROUP": packed.group_size if packed else 1,
            "HAS_NORM": self.norm.weight is not None,
            "HAS_NORM_BIAS": self.norm.bias is not None,
            "HAS_GAIN": self.calibration.gain is not None,
            "TILE_ROWS": self.tiling.rows,
        }
        if half:
            given = self.factor is not None
            tile, warps = half_tiling(self.tiling.rows, width, factor=given)
            constants |= {"HAS_FACTOR": given, "TURNED": self.turned, **tile}
            constants["num_stages"] = STAGES
        else:
            warps = self.tiling.warps(packed=packed is not None)
            constants |= {"PRECISION": "tf32x3", "TILE": self.tiling.columns, "TILE_K": TILE_K}
        (_half_rows_kernel if half else _rows_kernel)[(triton.cdiv(rows, self.tiling.span),)](
            *(x, *(out if t is None else t for t in tensors)),
            *(out, *(moments or (out, out)), rows, self.tiling.span),
            max(self.calibration.group_rows, 1),
            *((packed.latents, x.shape[1], packed.scales.shape[1]) if packed else (1, 1, 1)),
            *(self.calibration.target_rms, self.calibration.eps, self.norm.eps),
            **constants,
            num_warps=warps,
        )


def normalised_rows(source: Tensor | Packed, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """x `[N, d]`, and the rows' means and 1/deviations `[N]` in fp32 (empty without LayerNorm).

    One launch, or none where the source is x already.
    """
    rows, width = source.shape
    count = 0 if norm.weight is None else rows
    mean, rstd = (source.new_empty(count, dtype=torch.float32) for _ in range(2))
    if isinstance(source, Tensor) and norm.weight is None:
        return source, mean, rstd
    out = source.new_empty((rows, width), dtype=source.dtype)
    tile_rows, columns = plain_tiling(width)
    tiling = Tiling(tile_rows, columns, tile_rows)
    launch = _Launch(source, norm, Calibration(None, 1.0, 0.0, 0), tiling, out)
    launch.run(PLAIN, moments=(mean, rstd))
    return out, mean, rstd


def scaled_rows(
    source: Tensor | Packed,
    norm: Norm,
    calibration: Calibration,
    gram: Tensor,
    factor: Factor | None,
    outputs: int,
    *,
    turned: bool = False,
) -> tuple[Tensor, Tensor]:
    """`[s x, s, 1, 0 ...]` `[N, K]` in the source's dtype, and the mean squares r2 in fp32.

    One launch where a program holds all rows of a mean square, else two and their mean between.

    Args:
        gram: `[K, K]` fp32 of (W | b | 0); factor: used in its place if given; outputs: D;
            turned: of half precision rows with LayerNorm, s z `[N, d]` is made (`projection`).
    """
    (rows, width), group_rows = source.shape, calibration.group_rows
    most = LARGEST_TILE
    if is_half(source, norm):
        most = most_rows(width, shared=True)
        most = most if 1 < group_rows <= most else most_rows(width, shared=False)
    tiling = Tiling.of(rows, group_rows, packed=isinstance(source, Packed), most=most)
    out = source.new_empty((rows, gram.shape[0]), dtype=source.dtype)
    launch = _Launch(source, norm, calibration, tiling, out, gram, factor, turned, outputs)
    groups = rows // group_rows if group_rows else 0
    squares = source.new_empty(groups, dtype=torch.float32)
    if not group_rows:
        launch.run(CONSTANT)
    elif group_rows in (1, tiling.span):
        launch.run(ROW if group_rows == 1 else PROGRAM, squares=squares)
    else:
        per_row = source.new_empty(rows, dtype=torch.float32)
        launch.run(SQUARES, squares=per_row)
        squares = per_row.view(groups, group_rows).mean(1)
        launch.run(GIVEN, squares=squares)
    return out, squares
