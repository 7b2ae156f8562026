"""The nearest code of every row, in one pass: distances are never in memory.

For rows x `[N, d]` and codes c `[K, d]`: `argmin_k |c_k|^2 - 2 x . c_k`, the first of those that
tie; `|x|^2` is the same for all codes and left out. Products are fp32 throughout, without the
matrix units: codes that are nearly as near are told apart.

A program owns a block of rows and walks over the codes block by block. It keeps, per row, the least
distance so far and its code; a later block takes over only with a smaller one. Traffic: rows once
per block of codes (from cache, but for the first), codes once per program, 8 bytes a row out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_ROWS, BLOCK_CODES, MOST_WIDTH = 32, 64, 32
NUM_WARPS, STAGES = 4, 2  # with 3 stages, some widths spill
FEWEST = 16  # of a product's sides


@triton.jit
def _nearest_kernel(
    rows,
    codes,
    squares,
    found,
    N,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    CODES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < N
    column = tl.arange(0, BLOCK)
    least = tl.full((ROWS,), float("inf"), tl.float32)
    nearest = tl.zeros((ROWS,), tl.int32)
    for first in range(0, K, CODES):
        code = first + tl.arange(0, CODES)
        product = tl.zeros((ROWS, CODES), tl.float32)
        for start in range(0, WIDTH, BLOCK):
            at = start + column
            x = tl.load(
                rows + row[:, None] * WIDTH + at[None, :],
                mask=inside[:, None] & (at[None, :] < WIDTH),
                other=0.0,
            )
            c = tl.load(
                codes + code[None, :] * WIDTH + at[:, None],
                mask=(code[None, :] < K) & (at[:, None] < WIDTH),
                other=0.0,
            )
            product = tl.dot(x.to(tl.float32), c, product, input_precision="ieee")
        square = tl.load(squares + code, mask=code < K, other=float("inf"))
        distance = square[None, :] - 2 * product
        smallest, place = tl.min(distance, 1, return_indices=True)
        nearer = smallest < least
        nearest = tl.where(nearer, first + place, nearest)
        least = tl.where(nearer, smallest, least)
    tl.store(found + row, nearest.to(tl.int64), mask=inside)


def nearest_codes(rows_Nd: Tensor, codes_Kd: Tensor) -> Tensor:
    """`[N]` int64, one launch besides the codes' squares."""
    rows_Nd, codes_Kd = rows_Nd.contiguous(), codes_Kd.float().contiguous()
    found = rows_Nd.new_empty((len(rows_Nd),), dtype=torch.int64)
    if len(rows_Nd):
        width = rows_Nd.shape[1]
        _nearest_kernel[(triton.cdiv(len(rows_Nd), BLOCK_ROWS),)](
            *(rows_Nd, codes_Kd, codes_Kd.square().sum(-1), found, len(rows_Nd)),
            **constants_of(len(codes_Kd), width),
            num_warps=NUM_WARPS,
            num_stages=STAGES,
        )
    return found


def constants_of(codes: int, width: int) -> dict[str, int]:
    """What the kernel is compiled for."""
    block = min(MOST_WIDTH, max(FEWEST, triton.next_power_of_2(width)))
    return {"K": codes, "WIDTH": width, "ROWS": BLOCK_ROWS, "CODES": BLOCK_CODES, "BLOCK": block}
