"""Half precision rows on their way into the projection: each is read, unpacked and normalised once.

A program holds its rows whole, `[R, d]` with d <= 512, and finds r2 = ||W x + b||^2 / D by one
product on the matrix units, of the same half precision:

    factor   of frozen parameters: (W | b) = Q R, so that ||W x + b|| = ||R [x, 1]||: a sum of
             squares, in which nothing cancels that would not in W x + b itself
    Gram     of parameters that train, for which a QR decomposition takes too long: G = W'W,
             rounded on its way in; x'Gx + 2 c'x + b'b. Its c and b'b stay fp32

r2 is off by up to 1.4e-3 or 1.2e-3 (normal rows and W, bf16), where y in bf16 makes it 1.2e-3: half
of that in s, against the 4e-3 of a bf16 output. fp32 rows take `projection_rows`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from latentwire_fast.kernels.projection_pieces import (
    in_range,
    load_rows,
    normalise,
    row_scale,
    store_rows,
    store_tail,
    turned_rows,
)
from latentwire_fast.kernels.quantization import joined

# The widest row that a program holds, and the values of it that a thread does.
WIDEST = 512
THREAD_VALUES = 32
# One tile of the factor or of G is on its way while another is used; one more would take the
# shared memory of a second program.
STAGES = 2


@dataclass(frozen=True)
class Factor:
    """R of (W | b) = Q R for half precision rows: `||W x + b|| = ||R [x, 1]||`.

    matrix: R' `[d + 1, K]` in the rows' dtype, its upper rows those of x, its last b's;
    constants: `[2]` fp32, the square of what the matrix was divided by, and R's last number's.
    """

    matrix: Tensor
    constants: Tensor


def factor_of(plain: Tensor, width: int, dtype: torch.dtype) -> Factor:
    """Of P = (W | b | 0) `[D, K]`: some milliseconds, for parameters that stay as they are."""
    r = torch.linalg.qr(plain[:, : width + 1].float(), mode="r").R
    matrix = r.new_zeros((width + 1, plain.shape[1]))
    matrix[:, : r.shape[0]] = r.T
    largest = matrix.abs().amax() if dtype == torch.float16 else matrix.new_ones(())
    largest = torch.where(largest > 0, largest, 1.0)  # a NaN is in the matrix too
    constants = torch.stack([largest.square(), matrix[width, width].square()])
    return Factor((matrix / largest).to(dtype), constants)


@triton.jit
def _neighbours(start_ptr, live, COUNT: tl.constexpr):
    """COUNT bytes from each place on `[G, 1]`, all or none: read 16 at a time."""
    column = tl.arange(0, COUNT)[None, :]
    return tl.load(start_ptr + column, mask=live[:, None] & (column >= 0), other=0)


@triton.jit
def _unpacked_rows(
    codes_ptr, scales_ptr, first, live_row, WIDTH: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr, TILE_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows `[R, BLOCK]` from number `first` on, of whole groups each: then one example's codes
    follow another's without a gap."""
    HELD: tl.constexpr = WIDTH // GROUP
    PADDED: tl.constexpr = BLOCK // GROUP
    number = tl.arange(0, TILE_ROWS * PADDED)
    live = tl.broadcast_to(live_row[:, None], (TILE_ROWS, PADDED))
    live = tl.reshape(live, (TILE_ROWS * PADDED,)) & (number % PADDED < HELD)
    group = number // PADDED * HELD + number % PADDED
    start = codes_ptr + first * (WIDTH * BITS // 8) + group[:, None] * (GROUP * BITS // 8)
    low = _neighbours(start, live, GROUP if BITS == 8 else GROUP // 2)
    high = low
    if BITS == 6:
        high = _neighbours(start + GROUP // 2, live, GROUP // 4)
    codes = joined(low, high, BITS, TILE_ROWS * PADDED, GROUP)
    scale = tl.load(scales_ptr + first * HELD + group, mask=live, other=0.0)
    x = codes.to(tl.float32) * scale.to(tl.float32)[:, None]
    return tl.reshape(x, (TILE_ROWS, BLOCK))


@triton.jit
def _factor_squares(
    x, factor_ptr, constants_ptr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    TURNED: tl.constexpr, TILE_ROWS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """||R [x, 1]||^2 `[R]`; the factor is stored transposed, its column of b last, and in fp16
    divided by what the first of the constants is the square of; the second is R's last square.
    Turned rows hold their 1, and all of R is multiplied."""
    square = tl.zeros((TILE_ROWS,), tl.float32)
    inside = tl.arange(0, BLOCK)[:, None] < WIDTH
    rows = factor_ptr + tl.arange(0, BLOCK)[:, None] * PADDED
    for start in range(0, WIDTH, TILE):
        column = start + tl.arange(0, TILE)
        live = column < WIDTH
        factor = tl.load(rows + column[None, :], mask=inside & live[None, :], other=0.0)
        y = tl.dot(x, factor)
        if not TURNED:
            bias = tl.load(factor_ptr + WIDTH * PADDED + column, mask=live, other=0.0)
            y += bias.to(tl.float32)[None, :]
        square += tl.sum(y * y, 1)
    square *= tl.load(constants_ptr)
    if not TURNED:
        square += tl.load(constants_ptr + 1)
    return square


@triton.jit
def _gram_squares(
    x, gram_ptr, x_ptr, row, live_row, HELD: tl.constexpr, WIDTH: tl.constexpr,
    PADDED: tl.constexpr, TILE_ROWS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """x'Gx + 2c'x + b'b `[R]`; the rows lie at `x_ptr` too, PADDED wide. HELD: the place of
    the 1 and of c, which is within a turned row's WIDTH; masks of whole pieces keep reads wide."""
    inner = tl.arange(0, BLOCK)
    gram_rows = gram_ptr + inner[:, None] * PADDED
    unit = 1.0
    if x.dtype == tl.float16:  # G may be beyond its range: its largest number is on the diagonal
        diagonal = tl.load(gram_ptr + inner * (PADDED + 1), mask=inner < HELD, other=0.0)
        largest = tl.max(diagonal, 0)
        unit = tl.where(largest > 1e-30, 1.0 / largest, 1.0)
    square = tl.zeros((TILE_ROWS,), tl.float32)
    linear = tl.zeros((TILE_ROWS,), tl.float32)
    for start in range(0, WIDTH, TILE):
        column = start + tl.arange(0, TILE)
        live = column < WIDTH
        gram = tl.load(
            gram_rows + column[None, :], mask=(inner < HELD)[:, None] & live[None, :], other=0.0
        )
        cross = tl.dot(x, (gram * unit).to(x.dtype))
        place = x_ptr + row[:, None] * PADDED + column[None, :]
        part = tl.load(place, mask=live_row[:, None] & live[None, :], other=0.0).to(tl.float32)
        if HELD < WIDTH:
            part = tl.where((column < HELD)[None, :], part, 0.0)
        bias = tl.load(gram_ptr + HELD * PADDED + column, mask=live, other=0.0)
        square += tl.sum(cross * part, 1)
        linear += tl.sum(part * bias[None, :], 1)
    square = square / unit + 2.0 * linear + tl.load(gram_ptr + HELD * PADDED + HELD)
    # Rounding may leave less where W x and b cancel. No maximum: that drops NaN.
    return tl.where(square < 0, 0.0, square)


@triton.jit(do_not_specialize=["rows", "span", "rows_per_group", "latents", "code_bytes", "groups"])
def _half_rows_kernel(
    x_ptr, scales_ptr, norm_weight_ptr, norm_bias_ptr, gram_ptr, factor_ptr, constants_ptr,
    gain_ptr, squares_ptr, out_ptr, mean_ptr, rstd_ptr,
    rows, span, rows_per_group, latents, code_bytes, groups, target_rms, eps, norm_eps,
    MODE: tl.constexpr, HAS_FACTOR: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    OUTPUTS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, HAS_NORM: tl.constexpr,
    HAS_NORM_BIAS: tl.constexpr, HAS_GAIN: tl.constexpr, TURNED: tl.constexpr,
    TILE_ROWS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A program owns `span` rows. MODE is that of `projection_rows`. TURNED: makes `projection`'s
    s z, with LayerNorm's parameters in the weights."""
    HELD: tl.constexpr = WIDTH - 1 if TURNED else WIDTH  # values of a row before its 1
    program = tl.program_id(0).to(tl.int64)
    local = tl.arange(0, TILE_ROWS)
    row = program * span + local
    live_row = (local < span) & (row < rows)
    column = tl.arange(0, BLOCK)
    if (BITS > 0) & (WIDTH % GROUP == 0):
        x = _unpacked_rows(
            x_ptr, scales_ptr, program * span, live_row, WIDTH, BITS, GROUP, TILE_ROWS, BLOCK
        )
    else:
        live = live_row[:, None] & (column < WIDTH)[None, :]
        x = load_rows(
            x_ptr, scales_ptr, row, column, live, latents, code_bytes, groups, WIDTH, BITS, GROUP
        )
    if HAS_NORM:
        mean = tl.sum(x, 1) / WIDTH
        centred = tl.where((column < WIDTH)[None, :], x - mean[:, None], 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / WIDTH + norm_eps)
        if MODE == 0:
            tl.store(mean_ptr + row, mean, mask=live_row)
            tl.store(rstd_ptr + row, rstd, mask=live_row)
        if TURNED:
            x = turned_rows(x, mean, rstd, column, WIDTH)
        else:
            x = normalise(
                x, mean, rstd, norm_weight_ptr, norm_bias_ptr, column, WIDTH, HAS_NORM,
                HAS_NORM_BIAS,
            )  # fmt: skip
    x = x.to(out_ptr.dtype.element_ty)
    square = tl.zeros((TILE_ROWS,), tl.float32)
    if (MODE >= 2) & (MODE <= 4):
        if HAS_FACTOR:
            square = _factor_squares(
                x, factor_ptr, constants_ptr, WIDTH, PADDED, TURNED, TILE_ROWS, BLOCK, TILE
            )
        else:
            store_rows(out_ptr, x, row, column, live_row, WIDTH, PADDED)
            tl.debug_barrier()  # the product's threads read other parts of them
            square = _gram_squares(
                x, gram_ptr, out_ptr, row, live_row, HELD, WIDTH, PADDED, TILE_ROWS, BLOCK, TILE
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
        if TURNED:
            s = in_range(s, out_ptr.dtype.element_ty)
        scaled = x.to(tl.float32) * s[:, None]
        store_rows(out_ptr, scaled, row, column, live_row, WIDTH, PADDED)
        if not TURNED:
            store_tail(out_ptr, s, 1.0, row, live_row, WIDTH, PADDED)


def most_rows(width: int, *, shared: bool) -> int:
    """Of a program. Rows that share a mean square (`shared`) fit in up to 64, of up to 256 values.

    Others are fewer: 32 of 256 values in 8 warps take 122 registers, and an SM holds two programs,
    of which one works while the other waits for memory; 64 take 213, and it holds one.
    """
    return 64 if width <= (256 if shared else 128) else 32


def half_tiling(tile_rows: int, width: int, *, factor: bool) -> tuple[dict[str, int], int]:
    """The constants of a tile of so many rows, and the warps of a program. A tile of G is fp32."""
    block = max(triton.next_power_of_2(width), 16)
    warps = min(max(tile_rows * block // (32 * THREAD_VALUES), 4), 8)
    return {"BLOCK": block, "TILE": 64 if factor or block <= 256 else 32}, warps
