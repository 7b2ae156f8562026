"""What the kernels that walk over rows share: reading or unpacking them, LayerNorm, s, writing."""

from __future__ import annotations

import triton
import triton.language as tl

# Numbers that a program of 4 warps reads and writes at a time: 32 per thread.
TILE_VALUES = 4096


@triton.jit
def load_rows(
    x_ptr, scales_ptr, row, column, live, latents, code_bytes, groups,
    WIDTH: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Rows `[R]` (int64) and columns `[C]` in fp32; BITS 0: x lies there as it is.

    Codes are read byte by byte, as often as the values in a byte: with 1/32 and less of the
    output's bytes that costs nothing, and needs no tile to fall on a group's boundary.
    """
    if BITS == 0:
        x_rows = x_ptr + row[:, None] * WIDTH
        x = tl.load(x_rows + column[None, :], mask=live, other=0.0).to(tl.float32)
    else:
        example = (row // latents)[:, None]
        value = (row % latents).to(tl.int32)[:, None] * WIDTH + column[None, :]
        codes_ptr = x_ptr + example * code_bytes
        group = value // GROUP
        if BITS == 8:
            code = tl.load(codes_ptr + value, mask=live, other=0).to(tl.int32)
        elif BITS == 4:
            code = tl.load(codes_ptr + value // 2, mask=live, other=0).to(tl.int32)
            code = code >> (value % 2 * 4)
        else:
            place = value % GROUP
            start = group * (GROUP * 6 // 8)
            held = tl.minimum(latents * WIDTH - group * GROUP, GROUP)
            low = tl.load(codes_ptr + (start + place // 2), mask=live, other=0).to(tl.int32)
            start += (held + 1) // 2
            high = tl.load(codes_ptr + (start + place // 4), mask=live, other=0).to(tl.int32)
            code = ((low >> (place % 2 * 4)) & 15) | ((high >> (place % 4 * 2)) << 4)
        code = (code << (32 - BITS)) >> (32 - BITS)  # sign extension
        scale = tl.load(scales_ptr + example * groups + group, mask=live, other=0.0)
        x = code.to(tl.float32) * scale.to(tl.float32)
    return x


@triton.jit
def row_moments(
    x_ptr, scales_ptr, row, live_row, latents, code_bytes, groups, norm_eps,
    WIDTH: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, TILE_ROWS: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """Mean and 1/deviation `[R]`."""
    mean = tl.zeros((TILE_ROWS,), tl.float32)
    for start in range(0, WIDTH, STEP):
        column = start + tl.arange(0, STEP)
        live = live_row[:, None] & (column < WIDTH)[None, :]
        x = load_rows(
            x_ptr, scales_ptr, row, column, live, latents, code_bytes, groups, WIDTH, BITS, GROUP
        )
        mean += tl.sum(x, 1)
    mean /= WIDTH
    variance = tl.zeros((TILE_ROWS,), tl.float32)
    for start in range(0, WIDTH, STEP):
        column = start + tl.arange(0, STEP)
        live = live_row[:, None] & (column < WIDTH)[None, :]
        x = load_rows(
            x_ptr, scales_ptr, row, column, live, latents, code_bytes, groups, WIDTH, BITS, GROUP
        )
        centred = tl.where((column < WIDTH)[None, :], x - mean[:, None], 0.0)
        variance += tl.sum(centred * centred, 1)
    return mean, 1.0 / tl.sqrt(variance / WIDTH + norm_eps)


@triton.jit
def normalise(
    x, mean, rstd, norm_weight_ptr, norm_bias_ptr, column,
    WIDTH: tl.constexpr, HAS_NORM: tl.constexpr, HAS_NORM_BIAS: tl.constexpr,
):  # fmt: skip
    """LayerNorm of some columns, given the rows' moments. Columns past the width become 0."""
    if HAS_NORM:
        inside = column < WIDTH
        weight = tl.load(norm_weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
        x = (x - mean[:, None]) * rstd[:, None] * weight[None, :]
        if HAS_NORM_BIAS:
            bias = tl.load(norm_bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
            x += bias[None, :]
    return x


@triton.jit
def row_tile(
    x_ptr, scales_ptr, norm_weight_ptr, norm_bias_ptr, row, column, live_row, mean, rstd,
    latents, code_bytes, groups, WIDTH: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_NORM_BIAS: tl.constexpr,
):  # fmt: skip
    """Some columns of normalised rows."""
    live = live_row[:, None] & (column < WIDTH)[None, :]
    x = load_rows(
        x_ptr, scales_ptr, row, column, live, latents, code_bytes, groups, WIDTH, BITS, GROUP
    )
    return normalise(
        x, mean, rstd, norm_weight_ptr, norm_bias_ptr, column, WIDTH, HAS_NORM, HAS_NORM_BIAS
    )


@triton.jit
def turned_rows(x, mean, rstd, column, WIDTH: tl.constexpr):
    """z `[R, C]` of whole rows (`projection`): standardised, its last value spread over the others,
    and 1 in its place. Columns past the width become 0."""
    TURN: tl.constexpr = 1.0 / (WIDTH**0.5 - 1.0)
    x = (x - mean[:, None]) * rstd[:, None]
    last = tl.sum(tl.where((column == WIDTH - 1)[None, :], x, 0.0), 1)
    x = tl.where((column < WIDTH - 1)[None, :], x + TURN * last[:, None], 0.0)
    return tl.where((column == WIDTH - 1)[None, :], 1.0, x)


@triton.jit
def in_range(factor, dtype: tl.constexpr):
    """s as a half precision holds it.

    fp16 cannot hold an s past 65504, which only rows with y near 0 and a target RMS above 6 have.
    """
    if dtype == tl.float16:
        factor = tl.minimum(tl.maximum(factor, -65504.0), 65504.0)
    return factor


@triton.jit
def store_rows(out_ptr, x, row, column, live_row, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Some columns of rows PADDED wide."""
    live = live_row[:, None] & (column < WIDTH)[None, :]
    place = out_ptr + row[:, None] * PADDED + column[None, :]
    tl.store(place, x.to(out_ptr.dtype.element_ty), mask=live)


@triton.jit
def store_tail(out_ptr, factor, unit, row, live_row, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """`factor, unit, 0 ...` after a padded row's x."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    factor = in_range(factor, dtype)
    extra = tl.arange(0, 16)[None, :]
    tail = tl.where(extra == 0, factor[:, None], tl.where(extra == 1, unit, 0.0))
    live = live_row[:, None] & (extra < PADDED - WIDTH)
    tl.store(out_ptr + row[:, None] * PADDED + (WIDTH + extra), tail.to(dtype), mask=live)


@triton.jit
def row_scale(
    mean_square, gain_ptr, target_rms, eps, CALIBRATED: tl.constexpr, HAS_GAIN: tl.constexpr
):
    """s `[R]`."""
    s = tl.zeros_like(mean_square) + target_rms
    if HAS_GAIN:
        s *= tl.load(gain_ptr).to(tl.float32)
    if CALIBRATED:
        s /= tl.sqrt(mean_square + eps)
    return s


def plain_tiling(width: int) -> tuple[int, int]:
    """(rows, columns) of a tile of a launch that only reads and writes: whole rows if they fit."""
    columns = min(triton.next_power_of_2(width), TILE_VALUES)
    return TILE_VALUES // columns, columns
