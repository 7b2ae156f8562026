"""Group quantisation in one pass: quantise + pack, unpack + dequantise, and both at once.

Per group of g in {16, 32, 64} consecutive values, b in {8, 6, 4} bits, qmax = 2^(b-1) - 1:

    scale = fp16(min(amax / qmax, 65504)),   code = clamp(round_half_even(z / scale), -qmax, qmax)

with IEEE divisions, so that codes equal the CPU's bit for bit. A group with NaN or Inf gets the
scale NaN. In the clipping mode the scale is amax / (qmax + 1/2).

Bytes: groups follow one another; within a byte the first value has the lowest bits. 8 bits: one
code per byte. 4 bits: two. 6 bits: a plane of low 4 bits, two per byte, then a plane of high 2
bits, four per byte. The last group may be short; each of its planes is rounded up to a byte.

A program owns `BLOCK_GROUPS` whole groups `[BLOCK_GROUPS, g]`, so amax is a reduction within a row
of the tile and nothing is read twice. Traffic: n * (element size + b/8 + 2/g) bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# 32 values per thread of 4 warps: two or more 16-byte loads in flight per thread. Where the last
# group is short every byte has a mask of its own, for which 4 warps have too few registers.
BLOCK_VALUES = 4096
NUM_WARPS, NUM_WARPS_SHORT = 4, 8


@triton.jit
def _round_half_even(x):
    """For |x| < 2^22: adding 1.5 * 2^23 leaves no bits for the fraction, and rounds to even."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _quantize_tile(z, BITS: tl.constexpr, CLIP: tl.constexpr):
    """z `[GROUPS, g]` fp32 to codes (fp32, integral) and scales `[GROUPS]` fp16."""
    QMAX: tl.constexpr = float(2 ** (BITS - 1) - 1)
    STEPS: tl.constexpr = QMAX + 0.5 if CLIP else QMAX  # of one scale up to amax
    magnitude = tl.abs(z)
    finite = magnitude < float("inf")  # false for NaN too
    amax = tl.max(tl.where(finite, magnitude, 0.0), axis=1)
    broken = tl.max(tl.where(finite, 0, 1), axis=1) > 0
    scale = tl.minimum(tl.div_rn(amax, STEPS), 65504.0)
    scale = tl.where(broken, float("nan"), scale).to(tl.float16)
    step = scale.to(tl.float32)[:, None]
    live = step > 0
    codes = tl.div_rn(z, tl.where(live, step, 1.0))
    codes = tl.where(live, tl.minimum(tl.maximum(codes, -QMAX), QMAX), 0.0)
    return _round_half_even(codes), scale


@triton.jit
def _pairs(codes, GROUPS: tl.constexpr, COUNT: tl.constexpr):
    """`[GROUPS, 2 * COUNT]` to its even and its odd columns."""
    return tl.split(tl.reshape(codes, (GROUPS, COUNT, 2)))


@triton.jit
def _bytes_inside(column, held, group, groups, PER_BYTE: tl.constexpr, WHOLE: tl.constexpr):
    """Which of a plane's bytes, PER_BYTE values each, there are. Of whole groups all or none: the
    compiler sees that, and moves 16 at a time."""
    if WHOLE:
        inside = (group < groups)[:, None] & (column >= 0)
    else:
        inside = PER_BYTE * column < held[:, None]
    return inside


@triton.jit
def _place(n, GROUP: tl.constexpr, GROUPS: tl.constexpr):
    """This program's row, its groups `[GROUPS]` (int64), and how many values each holds."""
    tiles = (n - 1) // (GROUPS * GROUP) + 1  # tl.cdiv adds first, past 2^31 where n is just below
    program = tl.program_id(0).to(tl.int64)
    group = program % tiles * GROUPS + tl.arange(0, GROUPS)
    row = program // tiles
    return row, group, tl.minimum(tl.maximum(n - group * GROUP, 0), GROUP)


@triton.jit
def _quantize_pack_kernel(
    z_ptr, codes_ptr, scales_ptr, n, code_bytes, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, WHOLE: tl.constexpr,
    CLIP: tl.constexpr,
):  # fmt: skip
    row, group, held = _place(n, GROUP, GROUPS)
    offsets = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    z = tl.load(z_ptr + row * n + offsets, mask=offsets < n, other=0.0).to(tl.float32)
    codes, scale = _quantize_tile(z, BITS, CLIP)
    tl.store(scales_ptr + row * groups + group, scale, mask=group < groups)
    codes = codes.to(tl.int32)
    codes_ptr += row * code_bytes
    if BITS == 8:
        tl.store(codes_ptr + offsets, codes.to(tl.uint8), mask=offsets < n)
    else:
        start = group[:, None] * (GROUP * BITS // 8)
        column = tl.arange(0, GROUP // 2)[None, :]
        low, high = _pairs(codes & 15, GROUPS, GROUP // 2)
        tl.store(
            codes_ptr + start + column, (low | (high << 4)).to(tl.uint8),
            mask=_bytes_inside(column, held, group, groups, 2, WHOLE),
        )  # fmt: skip
        if BITS == 6:
            even, odd = _pairs((codes >> 4) & 3, GROUPS, GROUP // 2)
            first, third = _pairs(even, GROUPS, GROUP // 4)
            second, fourth = _pairs(odd, GROUPS, GROUP // 4)
            column = tl.arange(0, GROUP // 4)[None, :]
            plane = start + (GROUP // 2 if WHOLE else (held[:, None] + 1) // 2)
            tl.store(
                codes_ptr + plane + column,
                (first | (second << 2) | (third << 4) | (fourth << 6)).to(tl.uint8),
                mask=_bytes_inside(column, held, group, groups, 4, WHOLE),
            )


@triton.jit
def _unpack_dequantize_kernel(
    codes_ptr, scales_ptr, z_ptr, n, code_bytes, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    row, group, held = _place(n, GROUP, GROUPS)
    offsets = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    codes_ptr += row * code_bytes
    if BITS == 8:
        codes = tl.load(codes_ptr + offsets, mask=offsets < n, other=0).to(tl.int32)
    else:
        start = group[:, None] * (GROUP * BITS // 8)
        column = tl.arange(0, GROUP // 2)[None, :]
        inside = _bytes_inside(column, held, group, groups, 2, WHOLE)
        low = tl.load(codes_ptr + start + column, mask=inside, other=0)
        low = low.to(tl.int32)
        codes = tl.reshape(tl.join(low & 15, low >> 4), (GROUPS, GROUP))
        if BITS == 6:
            column = tl.arange(0, GROUP // 4)[None, :]
            plane = start + (GROUP // 2 if WHOLE else (held[:, None] + 1) // 2)
            inside = _bytes_inside(column, held, group, groups, 4, WHOLE)
            high = tl.load(codes_ptr + plane + column, mask=inside, other=0)
            high = high.to(tl.int32)
            even = tl.join(high & 3, (high >> 4) & 3)
            odd = tl.join((high >> 2) & 3, high >> 6)
            codes |= tl.reshape(tl.join(even, odd), (GROUPS, GROUP)) << 4
    codes = (codes << (32 - BITS)) >> (32 - BITS)  # sign extension
    scale = tl.load(scales_ptr + row * groups + group, mask=group < groups, other=0.0)
    z = codes.to(tl.float32) * scale.to(tl.float32)[:, None]
    tl.store(z_ptr + row * n + offsets, z.to(z_ptr.dtype.element_ty), mask=offsets < n)


@triton.jit
def _fake_quantize_kernel(
    z_ptr, out_ptr, n,
    BITS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, CLIP: tl.constexpr,
):  # fmt: skip
    row, group, _ = _place(n, GROUP, GROUPS)
    offsets = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    z = tl.load(z_ptr + row * n + offsets, mask=offsets < n, other=0.0).to(tl.float32)
    codes, scale = _quantize_tile(z, BITS, CLIP)
    z = codes * scale.to(tl.float32)[:, None]
    tl.store(out_ptr + row * n + offsets, z.to(out_ptr.dtype.element_ty), mask=offsets < n)


def _grid(batch: int, n: int, group_size: int) -> tuple[tuple[int], int, int]:
    """(grid, values per row, groups per program). Whole groups make the batch one long row."""
    if n % group_size == 0:
        batch, n = 1, batch * n
    groups = BLOCK_VALUES // group_size
    return (batch * triton.cdiv(n, groups * group_size),), n, groups


def quantize_pack(
    z_Bn: Tensor, *, bits: int, group_size: int, code_bytes: int, clip: bool = False
) -> tuple[Tensor, Tensor]:
    """`(packed codes [B, code_bytes] uint8, scales [B, ceil(n / group_size)] fp16)`, one launch."""
    z_Bn = z_Bn.contiguous()
    batch, n = z_Bn.shape
    codes = z_Bn.new_empty((batch, code_bytes), dtype=torch.uint8)
    scales = z_Bn.new_empty((batch, triton.cdiv(n, group_size)), dtype=torch.float16)
    if z_Bn.numel():
        grid, row, groups = _grid(batch, n, group_size)
        whole = row % group_size == 0
        _quantize_pack_kernel[grid](
            *(z_Bn, codes, scales, row, codes.numel() if row != n else code_bytes),
            *(triton.cdiv(row, group_size), bits, group_size, groups, whole, clip),
            num_warps=NUM_WARPS if whole else NUM_WARPS_SHORT,
        )
    return codes, scales


def unpack_dequantize(
    codes_Bb: Tensor,
    scales_BG: Tensor,
    *,
    bits: int,
    group_size: int,
    values: int,
    dtype: torch.dtype,
) -> Tensor:
    """`code * scale` `[B, values]` in `dtype`, one launch."""
    codes_Bb, scales_BG = codes_Bb.contiguous(), scales_BG.contiguous()
    batch, code_bytes = codes_Bb.shape
    z = codes_Bb.new_empty((batch, values), dtype=dtype)
    if z.numel():
        grid, row, groups = _grid(batch, values, group_size)
        whole = row % group_size == 0
        _unpack_dequantize_kernel[grid](
            *(codes_Bb, scales_BG, z, row, codes_Bb.numel() if row != values else code_bytes),
            *(triton.cdiv(row, group_size), bits, group_size, groups, whole),
            num_warps=NUM_WARPS if whole else NUM_WARPS_SHORT,
        )
    return z


def fake_quantize(z_Bn: Tensor, *, bits: int, group_size: int, clip: bool = False) -> Tensor:
    """Quantised and dequantised z, in its dtype; one launch, one read and one write."""
    z_Bn = z_Bn.contiguous()
    out = z_Bn.new_empty(z_Bn.shape, dtype=z_Bn.dtype)
    if out.numel():
        grid, row, groups = _grid(*z_Bn.shape, group_size)
        _fake_quantize_kernel[grid](
            *(z_Bn, out, row, bits, group_size, groups, clip), num_warps=NUM_WARPS
        )
    return out
