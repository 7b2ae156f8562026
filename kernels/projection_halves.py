"""Half precision rows on their way into the projection: each is read, unpacked and normalised once.

A program holds its rows whole, `[R, d]` with d <= 512, and finds r2 = ||W x + b||^2 / D by one
product on the matrix units, of the same half precision:

    factor   of frozen parameters: (W | b) = Q R, so that ||W x + b|| = ||R [x, 1]||: a sum of
             squares, in which nothing cancels that would not in W x + b itself
    Gram     of parameters that train, for which a QR decomposition takes too long: G = W'W,
             rounded on its way in; x'Gx + 2 c'x + b'b. Its c and b'b stay fp32

r2 is off by 1.5e-3 or 8.6e-4 (normal rows and W, bf16), where y in bf16 makes it 1.5e-3: half of
that in s, against the 4e-3 of a bf16 output. fp32 rows take `projection_rows`, as exact as fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from latentwire_fast.kernels.codes import unpacked
from latentwire_fast.kernels.projection_pieces import (
    load_rows,
    normalise,
    row_scale,
    store_rows,
    store_tail,
)

# The widest row that a program holds, and the values of it that a thread does.
WIDEST = 512
THREAD_VALUES = 64
# One tile of the factor or of G is on its way while another is used; one more would take the
# shared memory of a second program.
STAGES = 2


@triton.jit
def _whole_rows(
    x_ptr, scales_ptr, first, row, live_row, latents, code_bytes, groups, WIDTH: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, TILE_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows `[R, BLOCK]` in fp32, 0 past their width. Codes in whole groups are read 16 bytes at a
    time, others as `load_rows` does."""
    if (BITS > 0) & (WIDTH % GROUP == 0):
        # Groups of this program's rows, those of a row padded to a power of 2.
        held: tl.constexpr = WIDTH // GROUP
        padded: tl.constexpr = BLOCK // GROUP
        number = tl.arange(0, TILE_ROWS * padded)
        live = tl.reshape(
            tl.broadcast_to(live_row[:, None], (TILE_ROWS, padded)), (TILE_ROWS * padded,)
        ) & (number % padded < held)
        group = number // padded * held + number % padded
        codes = unpacked(
            x_ptr + first * (WIDTH * BITS // 8), group, live, BITS, GROUP, TILE_ROWS * padded
        )
        scale = tl.load(scales_ptr + first * held + group, mask=live, other=0.0).to(tl.float32)
        x = tl.reshape(codes.to(tl.float32) * scale[:, None], (TILE_ROWS, BLOCK))
    else:
        column = tl.arange(0, BLOCK)
        live = live_row[:, None] & (column < WIDTH)[None, :]
        x = load_rows(
            x_ptr, scales_ptr, row, column, live, latents, code_bytes, groups, WIDTH, BITS, GROUP
        )
    return x


@triton.jit
def _factor_squares(
    x, factor_ptr, constants_ptr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    TILE_ROWS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """||R [x, 1]||^2 `[R]`; the factor is stored transposed, its column of b last, and in fp16
    divided by what the first of the constants is the square of; the second is R's last square."""
    square = tl.zeros((TILE_ROWS,), tl.float32)
    inside = tl.arange(0, BLOCK)[:, None] < WIDTH
    rows = factor_ptr + tl.arange(0, BLOCK)[:, None] * PADDED
    for start in range(0, WIDTH, TILE):
        column = start + tl.arange(0, TILE)
        live = column < WIDTH
        factor = tl.load(rows + column[None, :], mask=inside & live[None, :], other=0.0)
        bias = tl.load(factor_ptr + WIDTH * PADDED + column, mask=live, other=0.0)
        y = tl.dot(x, factor) + bias.to(tl.float32)[None, :]
        square += tl.sum(y * y, 1)
    return square * tl.load(constants_ptr) + tl.load(constants_ptr + 1)


@triton.jit
def _gram_squares(
    x, gram_ptr, x_ptr, row, live_row, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    TILE_ROWS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """x'Gx + 2c'x + b'b `[R]`; the rows lie at `x_ptr` too, PADDED wide."""
    inner = tl.arange(0, BLOCK)
    gram_rows = gram_ptr + inner[:, None] * PADDED
    unit = 1.0
    if x.dtype == tl.float16:  # G may be beyond its range: its largest number is on the diagonal
        diagonal = tl.load(gram_ptr + inner * (PADDED + 1), mask=inner < WIDTH, other=0.0)
        largest = tl.max(diagonal, 0)
        unit = tl.where(largest > 0, 1.0 / largest, 1.0)
    square = tl.zeros((TILE_ROWS,), tl.float32)
    linear = tl.zeros((TILE_ROWS,), tl.float32)
    for start in range(0, WIDTH, TILE):
        column = start + tl.arange(0, TILE)
        live = column < WIDTH
        gram = tl.load(
            gram_rows + column[None, :], mask=(inner < WIDTH)[:, None] & live[None, :], other=0.0
        )
        cross = tl.dot(x, (gram * unit).to(x.dtype))
        place = x_ptr + row[:, None] * PADDED + column[None, :]
        part = tl.load(place, mask=live_row[:, None] & live[None, :], other=0.0).to(tl.float32)
        bias = tl.load(gram_ptr + WIDTH * PADDED + column, mask=live, other=0.0)
        square += tl.sum(cross * part, 1)
        linear += tl.sum(part * bias[None, :], 1)
    square = square / unit + 2.0 * linear + tl.load(gram_ptr + WIDTH * PADDED + WIDTH)
    # Rounding may leave less where W x and b cancel. No maximum: that drops NaN.
    return tl.where(square < 0, 0.0, square)


@triton.jit(do_not_specialize=["rows", "span", "rows_per_group", "latents", "code_bytes", "groups"])
def _half_rows_kernel(
    x_ptr, scales_ptr, norm_weight_ptr, norm_bias_ptr, gram_ptr, factor_ptr, constants_ptr,
    gain_ptr, squares_ptr, out_ptr, mean_ptr, rstd_ptr,
    rows, span, rows_per_group, latents, code_bytes, groups, target_rms, eps, norm_eps,
    MODE: tl.constexpr, HAS_FACTOR: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    OUTPUTS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, HAS_NORM: tl.constexpr,
    HAS_NORM_BIAS: tl.constexpr, HAS_GAIN: tl.constexpr, TILE_ROWS: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A program owns `span` rows. MODE is that of `projection_rows`."""
    program = tl.program_id(0).to(tl.int64)
    local = tl.arange(0, TILE_ROWS)
    row = program * span + local
    live_row = (local < span) & (row < rows)
    column = tl.arange(0, BLOCK)
    x = _whole_rows(
        x_ptr, scales_ptr, program * span, row, live_row, latents, code_bytes, groups, WIDTH, BITS,
        GROUP, TILE_ROWS, BLOCK,
    )  # fmt: skip
    if HAS_NORM:
        mean = tl.sum(x, 1) / WIDTH
        centred = tl.where((column < WIDTH)[None, :], x - mean[:, None], 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / WIDTH + norm_eps)
        if MODE == 0:
            tl.store(mean_ptr + row, mean, mask=live_row)
            tl.store(rstd_ptr + row, rstd, mask=live_row)
        x = normalise(
            x, mean, rstd, norm_weight_ptr, norm_bias_ptr, column, WIDTH, HAS_NORM, HAS_NORM_BIAS
        )
    x = x.to(out_ptr.dtype.element_ty)
    square = tl.zeros((TILE_ROWS,), tl.float32)
    if (MODE >= 2) & (MODE <= 4):
        if HAS_FACTOR:
            square = _factor_squares(
                x, factor_ptr, constants_ptr, WIDTH, PADDED, TILE_ROWS, BLOCK, TILE
            )
        else:
            store_rows(out_ptr, x, row, column, live_row, WIDTH, PADDED)
            tl.debug_barrier()  # the product's threads read other parts of them
            square = _gram_squares(
                x, gram_ptr, out_ptr, row, live_row, WIDTH, PADDED, TILE_ROWS, BLOCK, TILE
            )
            tl.debug_barrier()
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
    if MODE == 0:
        store_rows(out_ptr, x, row, column, live_row, WIDTH, PADDED)
    elif MODE != 4:
        s = row_scale(square, gain_ptr, target_rms, eps, MODE != 1, HAS_GAIN)
        scaled = x.to(tl.float32) * s[:, None]
        store_rows(out_ptr, scaled, row, column, live_row, WIDTH, PADDED)
        store_tail(out_ptr, s, 1.0, row, live_row, WIDTH, PADDED)


def most_rows(width: int) -> int:
    """Of a program: beyond 256 values each, more than 32 rows leave too few registers."""
    return 64 if width <= 256 else 32


def half_tiling(tile_rows: int, width: int, *, factor: bool) -> tuple[dict[str, int], int]:
    """The constants of a tile of so many rows, and the warps of a program. A tile of G is fp32."""
    block = max(triton.next_power_of_2(width), 16)
    warps = min(max(tile_rows * block // (32 * THREAD_VALUES), 4), 8)
    return {"BLOCK": block, "TILE": 64 if factor or block <= 256 else 32}, warps
