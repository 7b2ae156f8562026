"""Group quantisation in one pass: quantise + pack, unpack + dequantise, and both at once.

Per group of g in {16, 32, 64} consecutive values, b in {8, 6, 4} bits, qmax = 2^(b-1) - 1:

    scale = fp16(min(amax / qmax, 65504)),   code = clamp(round_half_even(z / scale), -qmax, qmax)

with quotients rounded as IEEE divisions round them, so that codes equal the CPU's bit for bit. A
group with NaN or Inf gets the scale NaN and codes 0. In the clipping mode the scale is
amax / (qmax + 1/2).

Bytes: groups follow one another; within a byte the first value has the lowest bits. 8 bits: one
code per byte. 4 bits: two. 6 bits: a plane of low 4 bits, two per byte, then a plane of high 2
bits, four per byte. The last group may be short; each of its planes is rounded up to a byte.

A program owns whole groups, a tile `[GROUPS, g]`, so amax is a reduction within a row of the tile
and nothing is read twice. Traffic: n * (element size + b/8 + 2/g) bytes. Per value it executes 14
to 20 instructions (`bench.kernels.issue_budget`); past 26 an H200 would wait for those.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# 32 values per thread of 4 warps: two or more 16-byte loads in flight per thread. Where the last
# group is short every byte has a mask of its own, for which 4 warps have too few registers.
BLOCK_VALUES = 4096
NUM_WARPS, NUM_WARPS_SHORT = 4, 8
# So many values do not give each of an H100's or H200's 132 SMs one: programs of one warp then.
FEW_VALUES, FEW_BLOCK = 132 * 4096, 512
# 1.5 * 2^23: a sum of it and |x| < 2^22 has no bits for a fraction, and rounds x half to even.
MAGIC = tl.constexpr(12582912.0)


@triton.jit
def _larger_or_nan(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _fma(a, b, c, INTERPRETED: tl.constexpr):
    """`a * b + c`, rounded once. The interpreter's own rounds twice: there it goes through fp64."""
    if INTERPRETED:
        found = (a.to(tl.float64) * b.to(tl.float64) + c.to(tl.float64)).to(tl.float32)
    else:
        found = tl.fma(a, b, c)
    return found


@triton.jit
def _quotient(a, b, inverse, INTERPRETED: tl.constexpr):
    """a / b as an IEEE division rounds it, given 1 / b as one rounds that (Markstein): what is left
    of a after the first product is exact."""
    quotient = a * inverse
    rest = _fma(-quotient, b, a, INTERPRETED)
    return _fma(rest, inverse, quotient, INTERPRETED)


@triton.jit
def _inverse(step, INTERPRETED: tl.constexpr):
    """1 / step as an IEEE division rounds it, for normal fp32 numbers of at most 11 bits.

    A step of Newton's squares the error of an approximation: below 2^-40, while the exact inverse
    of such a number is 2^-36 or more away from where rounding would go the other way.
    """
    if INTERPRETED:
        near = 1.0 / step
    else:
        near = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [step], dtype=tl.float32, is_pure=True, pack=1
        )
    one = tl.full(step.shape, 1.0, tl.float32)
    return _fma(_fma(-near, step, one, INTERPRETED), near, near, INTERPRETED)


@triton.jit
def _quantize_tile(z, BITS: tl.constexpr, CLIP: tl.constexpr, INTERPRETED: tl.constexpr):
    """z `[GROUPS, g]` fp32 to MAGIC + codes, whose low bits are the codes', and scales `[GROUPS]`
    fp16. One division a group, two fused corrections a value."""
    QMAX: tl.constexpr = float(2 ** (BITS - 1) - 1)
    STEPS: tl.constexpr = QMAX + 0.5 if CLIP else QMAX  # of one scale up to amax
    magnitude = tl.abs(z)
    if INTERPRETED:  # where a reduction of our own takes a call a number, and this one skips NaN
        bits = tl.max(magnitude.to(tl.int32, bitcast=True), axis=1)
        amax = bits.to(tl.float32, bitcast=True)
    else:
        amax = tl.reduce(magnitude, 1, _larger_or_nan)
    scale = _quotient(
        amax,
        tl.full(amax.shape, STEPS, tl.float32),
        tl.full(amax.shape, 1.0 / STEPS, tl.float32),
        INTERPRETED,
    )
    scale = tl.minimum(scale, 65504.0)
    scale = tl.where(amax < float("inf"), scale, float("nan")).to(tl.float16)
    step = scale.to(tl.float32)
    live = step > 0  # false of NaN too, whose group's codes are 0
    largest = tl.where(live, QMAX, 0.0)[:, None]
    step = tl.where(live, step, 1.0)
    inverse = _inverse(step, INTERPRETED)
    codes = _quotient(z, step[:, None], inverse[:, None], INTERPRETED)
    return tl.minimum(tl.maximum(codes, -largest), largest) + MAGIC, scale


@triton.jit
def _pairs(codes, GROUPS: tl.constexpr, COUNT: tl.constexpr):
    """`[GROUPS, 2 * COUNT]` to its even and its odd columns."""
    return tl.split(tl.reshape(codes, (GROUPS, COUNT, 2)))


@triton.jit
def _place(n, GROUP: tl.constexpr, GROUPS: tl.constexpr, WHOLE: tl.constexpr):
    """This program's row and first group, both int64, and how many values from there on are its
    own. Whole groups make the batch one row."""
    program = tl.program_id(0).to(tl.int64)
    if WHOLE:
        row, first = program * 0, program * GROUPS
    else:
        tiles = (n - 1) // (GROUPS * GROUP) + 1  # tl.cdiv adds first, past 2^31 where n is below
        row, first = program // tiles, program % tiles * GROUPS
    values = tl.minimum(n - first * GROUP, GROUPS * GROUP).to(tl.int32)
    if WHOLE:
        values = tl.multiple_of(values, GROUP)
    return row, first, values


@triton.jit
def _bytes_inside(values, PER_BYTE: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
                  WHOLE: tl.constexpr):  # fmt: skip
    """Which bytes of a plane `[GROUPS, g / PER_BYTE]` there are. Of whole groups all or none: the
    compiler sees that, and moves 16 at a time."""
    start = tl.arange(0, GROUPS)[:, None] * GROUP
    column = tl.arange(0, GROUP // PER_BYTE)[None, :]
    return (start < values) & (column >= 0) if WHOLE else start + PER_BYTE * column < values


@triton.jit
def _high_plane(values, GROUP: tl.constexpr, GROUPS: tl.constexpr, WHOLE: tl.constexpr):
    """Where within its group the plane of high bits begins, `[GROUPS, 1]`."""
    if WHOLE:
        start = tl.full((GROUPS, 1), GROUP // 2, tl.int32)
    else:
        held = tl.minimum(tl.maximum(values - tl.arange(0, GROUPS) * GROUP, 0), GROUP)
        start = (held[:, None] + 1) // 2
    return start


@triton.jit
def joined(low, high, BITS: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr):
    """Codes `[GROUPS, g]` int32 of their bytes: all of 8 bits, else the plane of low bits
    `[GROUPS, g / 2]`, and of 6 bits the one of high bits `[GROUPS, g / 4]` too."""
    codes = low.to(tl.int32)
    if BITS != 8:
        codes = tl.reshape(tl.join(codes & 15, codes >> 4), (GROUPS, GROUP))
    if BITS == 6:
        high = high.to(tl.int32)
        even = tl.join(high & 3, (high >> 4) & 3)
        odd = tl.join((high >> 2) & 3, high >> 6)
        codes |= tl.reshape(tl.join(even, odd), (GROUPS, GROUP)) << 4
    return (codes << (32 - BITS)) >> (32 - BITS)  # sign extension


@triton.jit
def _quantize_pack_kernel(
    z_ptr, codes_ptr, scales_ptr, n, code_bytes, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, WHOLE: tl.constexpr,
    CLIP: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    row, first, values = _place(n, GROUP, GROUPS, WHOLE)
    group = tl.arange(0, GROUPS)
    offsets = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    z_ptr += row * n + first * GROUP
    z = tl.load(z_ptr + offsets, mask=offsets < values, other=0.0).to(tl.float32)
    codes, scale = _quantize_tile(z, BITS, CLIP, INTERPRETED)
    tl.store(scales_ptr + row * groups + first + group, scale, mask=group * GROUP < values)
    codes = codes.to(tl.int32, bitcast=True)
    codes_ptr += row * code_bytes + first * (GROUP * BITS // 8)
    if BITS == 8:
        tl.store(codes_ptr + offsets, codes.to(tl.uint8), mask=offsets < values)
    else:
        start = group[:, None] * (GROUP * BITS // 8)
        even, odd = _pairs(codes, GROUPS, GROUP // 2)
        tl.store(
            codes_ptr + start + tl.arange(0, GROUP // 2)[None, :],
            ((even & 15) + (odd << 4)).to(tl.uint8),
            mask=_bytes_inside(values, 2, GROUP, GROUPS, WHOLE),
        )
        if BITS == 6:
            of_1, of_3 = _pairs((even >> 4) & 3, GROUPS, GROUP // 4)
            of_2, of_4 = _pairs((odd >> 4) & 3, GROUPS, GROUP // 4)
            start += _high_plane(values, GROUP, GROUPS, WHOLE)
            tl.store(
                codes_ptr + start + tl.arange(0, GROUP // 4)[None, :],
                (of_1 | (of_2 << 2) | (of_3 << 4) | (of_4 << 6)).to(tl.uint8),
                mask=_bytes_inside(values, 4, GROUP, GROUPS, WHOLE),
            )


@triton.jit
def _unpack_dequantize_kernel(
    codes_ptr, scales_ptr, z_ptr, n, code_bytes, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    row, first, values = _place(n, GROUP, GROUPS, WHOLE)
    group = tl.arange(0, GROUPS)
    offsets = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    codes_ptr += row * code_bytes + first * (GROUP * BITS // 8)
    if BITS == 8:
        low = tl.load(codes_ptr + offsets, mask=offsets < values, other=0)
    else:
        start = group[:, None] * (GROUP * BITS // 8)
        inside = _bytes_inside(values, 2, GROUP, GROUPS, WHOLE)
        low = tl.load(codes_ptr + start + tl.arange(0, GROUP // 2)[None, :], mask=inside, other=0)
    high = low
    if BITS == 6:
        start += _high_plane(values, GROUP, GROUPS, WHOLE)
        inside = _bytes_inside(values, 4, GROUP, GROUPS, WHOLE)
        high = tl.load(codes_ptr + start + tl.arange(0, GROUP // 4)[None, :], mask=inside, other=0)
    codes = joined(low, high, BITS, GROUPS, GROUP)
    scale = tl.load(
        scales_ptr + row * groups + first + group, mask=group * GROUP < values, other=0.0
    )
    z = codes.to(tl.float32) * scale.to(tl.float32)[:, None]
    z_ptr += row * n + first * GROUP
    tl.store(z_ptr + offsets, z.to(z_ptr.dtype.element_ty), mask=offsets < values)


@triton.jit
def _fake_quantize_kernel(
    z_ptr, out_ptr, n,
    BITS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, WHOLE: tl.constexpr,
    CLIP: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    row, first, values = _place(n, GROUP, GROUPS, WHOLE)
    offsets = tl.arange(0, GROUPS)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    start = row * n + first * GROUP
    z = tl.load(z_ptr + start + offsets, mask=offsets < values, other=0.0).to(tl.float32)
    codes, scale = _quantize_tile(z, BITS, CLIP, INTERPRETED)
    step = scale.to(tl.float32)[:, None]
    # (codes - MAGIC) * step in one: MAGIC has two bits, so that its product is exact.
    z = _fma(codes, step, step * -MAGIC, INTERPRETED)
    tl.store(out_ptr + start + offsets, z.to(out_ptr.dtype.element_ty), mask=offsets < values)


@dataclass(frozen=True)
class _Grid:
    """A launch over a batch of rows: its programs, a row's values, the constants of its tiles.

    Whole groups make the batch one long row.
    """

    programs: int
    row: int
    constants: dict[str, Any]

    @classmethod
    def of(cls, batch: int, n: int, *, bits: int, group_size: int) -> _Grid:
        whole, few = n % group_size == 0, batch * n < FEW_VALUES
        if whole:
            batch, n = 1, batch * n
        block = FEW_BLOCK if few else BLOCK_VALUES
        many = NUM_WARPS if whole else NUM_WARPS_SHORT
        constants = {
            **{"BITS": bits, "GROUP": group_size, "GROUPS": block // group_size, "WHOLE": whole},
            "num_warps": 1 if few else many,
        }
        return cls(batch * triton.cdiv(n, block), n, constants)


def quantize_pack(
    z_Bn: Tensor, *, bits: int, group_size: int, code_bytes: int, clip: bool = False
) -> tuple[Tensor, Tensor]:
    """`(packed codes [B, code_bytes] uint8, scales [B, ceil(n / group_size)] fp16)`, one launch."""
    z_Bn = z_Bn.contiguous()
    batch, n = z_Bn.shape
    codes = z_Bn.new_empty((batch, code_bytes), dtype=torch.uint8)
    scales = z_Bn.new_empty((batch, triton.cdiv(n, group_size)), dtype=torch.float16)
    if z_Bn.numel():
        grid = _Grid.of(batch, n, bits=bits, group_size=group_size)
        _quantize_pack_kernel[(grid.programs,)](
            *(z_Bn, codes, scales, grid.row, code_bytes, triton.cdiv(grid.row, group_size)),
            **grid.constants,
            CLIP=clip,
            INTERPRETED=triton.knobs.runtime.interpret,
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
        grid = _Grid.of(batch, values, bits=bits, group_size=group_size)
        _unpack_dequantize_kernel[(grid.programs,)](
            *(codes_Bb, scales_BG, z, grid.row, code_bytes, triton.cdiv(grid.row, group_size)),
            **grid.constants,
        )
    return z


def fake_quantize(z_Bn: Tensor, *, bits: int, group_size: int, clip: bool = False) -> Tensor:
    """Quantised and dequantised z, in its dtype; one launch, one read and one write."""
    z_Bn = z_Bn.contiguous()
    out = z_Bn.new_empty(z_Bn.shape, dtype=z_Bn.dtype)
    if out.numel():
        grid = _Grid.of(*z_Bn.shape, bits=bits, group_size=group_size)
        _fake_quantize_kernel[(grid.programs,)](
            *(z_Bn, out, grid.row),
            **grid.constants,
            CLIP=clip,
            INTERPRETED=triton.knobs.runtime.interpret,
        )
    return out
