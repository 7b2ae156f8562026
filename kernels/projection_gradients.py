"""The kernels of the projection's backward pass; `projection_backward` has the formulas.

rows        <dout, gamma*y> per row, then s [x, 1] and w [x, 1]
norm        LayerNorm's gradient of a row, and the sums of its parameters' by programs
parameters  d(W | b), dgamma and dbeta from one read of dout' [s x, s, 1]; if turned, back to
            the parameters as they are, and the sums of the norm's by programs
sums        of what the programs of the last two have left, always in the same order
"""

from __future__ import annotations

import triton
import triton.language as tl

from latentwire_fast.kernels.projection_pieces import (
    in_range,
    load_rows,
    row_moments,
    row_scale,
    row_tile,
    store_rows,
    store_tail,
    turned_rows,
)

# What a launch of `_gradient_rows_kernel` does.
DOTS, WRITE, BOTH = range(3)
# Outputs of a program of `_parameters_kernel`.
PARAMETER_ROWS = 8
# Tile of `_sums_kernel`.
SUM_PARTS, SUM_COLUMNS = 128, 16


@triton.jit(do_not_specialize=["rows", "rows_per_group"])
def _gradient_rows_kernel(
    x_ptr, norm_weight_ptr, norm_bias_ptr, gain_ptr, along_ptr, squares_ptr, dots_ptr,
    scaled_ptr, weighted_ptr, rows, rows_per_group, target_rms, eps, norm_eps,
    MODE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, OUTER: tl.constexpr,
    OUTPUTS: tl.constexpr, CALIBRATED: tl.constexpr, HAS_NORM: tl.constexpr,
    HAS_NORM_BIAS: tl.constexpr, HAS_GAIN: tl.constexpr, TURNED: tl.constexpr,
    BLOCK: tl.constexpr, TILE_ROWS: tl.constexpr,
):  # fmt: skip
    """MODE 0: `dots = <along, [x, 1]>` per row. 1: the scaled rows, OUTER wide, and the weighted,
    PADDED wide, given the dots' sums per group of rows. 2: both, each row a group of its own."""
    row = tl.program_id(0).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    live_row = row < rows
    column = tl.arange(0, BLOCK)
    mean = tl.zeros((TILE_ROWS,), tl.float32)
    rstd = mean
    if HAS_NORM:
        mean, rstd = row_moments(
            x_ptr, x_ptr, row, live_row, 1, 1, 1, norm_eps, WIDTH, 0, 1, TILE_ROWS, BLOCK
        )
    if TURNED:
        live = live_row[:, None] & (column < WIDTH)[None, :]
        x = load_rows(x_ptr, x_ptr, row, column, live, 1, 1, 1, WIDTH, 0, 1)
        x = turned_rows(x, mean, rstd, column, WIDTH)
    else:
        x = row_tile(
            x_ptr, x_ptr, norm_weight_ptr, norm_bias_ptr, row, column, live_row, mean, rstd,
            1, 1, 1, WIDTH, 0, 1, HAS_NORM, HAS_NORM_BIAS,
        )  # fmt: skip
    if MODE != 1:
        along = tl.load(
            along_ptr + row[:, None] * PADDED + column[None, :],
            mask=live_row[:, None] & (column < WIDTH)[None, :],
            other=0.0,
        )
        dots = tl.sum(x * along, 1)
        if not TURNED:
            dots += tl.load(along_ptr + row * PADDED + WIDTH, mask=live_row, other=0.0)
        tl.store(dots_ptr + row, dots, mask=live_row)
    if MODE != 0:
        square = tl.zeros((TILE_ROWS,), tl.float32)
        if CALIBRATED:
            group = row // rows_per_group
            square = tl.load(squares_ptr + group, mask=live_row, other=1.0)
            if MODE == 1:
                dots = tl.load(dots_ptr + group, mask=live_row, other=0.0)
            weight = dots / (1.0 * rows_per_group * OUTPUTS * (square + eps))
            store_rows(weighted_ptr, x * weight[:, None], row, column, live_row, WIDTH, PADDED)
            if not TURNED:
                store_tail(weighted_ptr, weight, 0.0, row, live_row, WIDTH, PADDED)
        s = row_scale(square, gain_ptr, target_rms, eps, CALIBRATED, HAS_GAIN)
        if TURNED:
            s = in_range(s, scaled_ptr.dtype.element_ty)
        store_rows(scaled_ptr, x * s[:, None], row, column, live_row, WIDTH, OUTER)
        if not TURNED:
            store_tail(scaled_ptr, s, 1.0, row, live_row, WIDTH, OUTER)
        elif OUTER > PADDED:  # the 1 that adds up dout
            store_tail(scaled_ptr, tl.full((TILE_ROWS,), 1.0, tl.float32), 0.0, row, live_row,
                       WIDTH, OUTER)  # fmt: skip


@triton.jit(do_not_specialize=["rows", "rows_per_group"])
def _norm_gradient_kernel(
    x_ptr, grad_ptr, norm_weight_ptr, gain_ptr, squares_ptr, out_ptr, parts_ptr,
    rows, rows_per_group, target_rms, eps, norm_eps,
    WIDTH: tl.constexpr, STRIDE: tl.constexpr, SCALED: tl.constexpr, CALIBRATED: tl.constexpr,
    HAS_GAIN: tl.constexpr, HAS_NORM: tl.constexpr, TURNED: tl.constexpr, SUMS: tl.constexpr,
    BLOCK: tl.constexpr, TILE_ROWS: tl.constexpr,
):  # fmt: skip
    """dx from the fp32 gradient of the normalised (or turned) rows, STRIDE apart, times s if
    SCALED; SUMS: the program's of the norm's weight and bias too, [programs, 2, WIDTH]."""
    program = tl.program_id(0).to(tl.int64)
    row = program * TILE_ROWS + tl.arange(0, TILE_ROWS)
    live_row = row < rows
    column = tl.arange(0, BLOCK)
    inside = (column < WIDTH)[None, :]
    live = live_row[:, None] & inside
    grad = tl.load(grad_ptr + row[:, None] * STRIDE + column[None, :], mask=live, other=0.0)
    if SCALED:
        square = tl.zeros((TILE_ROWS,), tl.float32)
        if CALIBRATED:
            square = tl.load(squares_ptr + row // rows_per_group, mask=live_row, other=1.0)
        grad *= row_scale(square, gain_ptr, target_rms, eps, CALIBRATED, HAS_GAIN)[:, None]
    if HAS_NORM:
        x = load_rows(x_ptr, x_ptr, row, column, live, 1, 1, 1, WIDTH, 0, 1)
        centred = tl.where(inside, x - (tl.sum(x, 1) / WIDTH)[:, None], 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / WIDTH + norm_eps)
        x = centred * rstd[:, None]
        if SUMS:
            # Rows that there are not have a gradient of 0.
            place = parts_ptr + program * (2 * WIDTH) + column
            tl.store(place, tl.sum(grad * x, 0), mask=column < WIDTH)
            tl.store(place + WIDTH, tl.sum(grad, 0), mask=column < WIDTH)
        if TURNED:
            TURN: tl.constexpr = 1.0 / (WIDTH**0.5 - 1.0)
            at_end = (column == WIDTH - 1)[None, :]
            grad = tl.where(at_end, 0.0, grad)
            grad = tl.where(at_end, TURN * tl.sum(grad, 1)[:, None], grad)
        else:
            weight = tl.load(norm_weight_ptr + column, mask=column < WIDTH, other=0.0)
            grad *= weight.to(tl.float32)[None, :]
        mean = tl.sum(grad, 1) / WIDTH
        along = tl.sum(grad * x, 1) / WIDTH
        grad = (grad - mean[:, None] - x * along[:, None]) * rstd[:, None]
    place = out_ptr + row[:, None] * WIDTH + column[None, :]
    tl.store(place, grad.to(out_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["outputs"])
def _parameters_kernel(
    outer_ptr, taken_ptr, plain_ptr, weight_ptr, gamma_ptr, norm_weight_ptr, norm_bias_ptr,
    d_weight_ptr, d_bias_ptr, d_gamma_ptr, d_beta_ptr, parts_ptr, outputs,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, OUTER: tl.constexpr, HAS_TAKEN: tl.constexpr,
    HAS_GAMMA: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_BETA: tl.constexpr,
    HAS_NORM_BIAS: tl.constexpr, TURNED: tl.constexpr, TILE_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """From `outer = dout' [s x, s, 1]` `[D, OUTER]` and what calibration takes away `[D, PADDED]`,
    each in its parameter's dtype. TURNED: the program's sums of the norm's weight and bias too."""
    program = tl.program_id(0).to(tl.int64)
    output = program * TILE_ROWS + tl.arange(0, TILE_ROWS)
    live_row = output < outputs
    column = tl.arange(0, BLOCK)[None, :]
    live = live_row[:, None] & (column < PADDED)
    grad = tl.load(outer_ptr + output[:, None] * OUTER + column, mask=live, other=0.0)
    if HAS_GAMMA:
        plain = tl.load(plain_ptr + output[:, None] * PADDED + column, mask=live, other=0.0)
        d_gamma = tl.sum(grad * plain.to(tl.float32), 1)
        tl.store(d_gamma_ptr + output, d_gamma.to(d_gamma_ptr.dtype.element_ty), mask=live_row)
        gamma = tl.load(gamma_ptr + output, mask=live_row, other=0.0)
        grad *= gamma.to(tl.float32)[:, None]
    if HAS_BETA:
        ONE: tl.constexpr = WIDTH if TURNED else WIDTH + 1
        d_beta = tl.load(outer_ptr + output * OUTER + ONE, mask=live_row, other=0.0)
        tl.store(d_beta_ptr + output, d_beta.to(d_beta_ptr.dtype.element_ty), mask=live_row)
    if HAS_TAKEN:
        grad -= tl.load(taken_ptr + output[:, None] * PADDED + column, mask=live, other=0.0)
    at_bias = column == (WIDTH - 1 if TURNED else WIDTH)
    d_bias = tl.sum(tl.where(at_bias, grad, 0.0), 1)
    if HAS_BIAS:
        tl.store(d_bias_ptr + output, d_bias.to(d_bias_ptr.dtype.element_ty), mask=live_row)
    inside = live_row[:, None] & (column < WIDTH)
    if TURNED:
        ROOT: tl.constexpr = WIDTH**0.5
        total = tl.sum(tl.where(at_bias, 0.0, grad), 1)[:, None]
        grad = tl.where(at_bias, total / ROOT, grad - total / (ROOT * (ROOT - 1.0)))
        weight = tl.load(weight_ptr + output[:, None] * WIDTH + column, mask=inside, other=0.0)
        weight = weight.to(tl.float32)
        place = parts_ptr + program * (2 * WIDTH) + column
        moved = tl.sum(grad * weight, 0)[None, :]
        tl.store(place, moved, mask=column < WIDTH)
        offset = tl.sum(d_bias[:, None] * weight, 0)[None, :]
        tl.store(place + WIDTH, offset, mask=column < WIDTH)
        scale = tl.load(norm_weight_ptr + column, mask=column < WIDTH, other=0.0)
        grad *= scale.to(tl.float32)
        if HAS_NORM_BIAS:
            shift = tl.load(norm_bias_ptr + column, mask=column < WIDTH, other=0.0)
            grad += d_bias[:, None] * shift.to(tl.float32)
    place = d_weight_ptr + output[:, None] * WIDTH + column
    tl.store(place, grad.to(d_weight_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["parts"])
def _sums_kernel(
    parts_ptr, first_ptr, second_ptr, parts, HAS_SECOND: tl.constexpr, WIDTH: tl.constexpr,
    STEPS: tl.constexpr, TILE_PARTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """[parts, 2, WIDTH] over the parts: the first row and, if there is one, the second.

    STEPS of TILE_PARTS hold all parts: few numbers of steps, each of which compiles.
    """
    program = tl.program_id(0).to(tl.int64)
    blocks: tl.constexpr = (WIDTH + TILE - 1) // TILE
    column = program % blocks * TILE + tl.arange(0, TILE)
    plane = program // blocks
    sums = tl.zeros((TILE_PARTS, TILE), tl.float32)
    for step in range(STEPS):
        part = step * TILE_PARTS + tl.arange(0, TILE_PARTS)
        place = (part.to(tl.int64)[:, None] * 2 + plane) * WIDTH + column[None, :]
        live = (part < parts)[:, None] & (column < WIDTH)[None, :]
        sums += tl.load(parts_ptr + place, mask=live, other=0.0)
    total = tl.sum(sums, 0)
    live = column < WIDTH
    tl.store(first_ptr + column, total.to(first_ptr.dtype.element_ty), mask=live & (plane == 0))
    if HAS_SECOND:
        second = total.to(second_ptr.dtype.element_ty)
        tl.store(second_ptr + column, second, mask=live & (plane == 1))
