"""Reading packed codes: what `quantization` and the projection's kernels share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def unpacked(codes_ptr, group, live, BITS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr):
    """Codes `[GROUPS, g]` int32 of whole groups `[GROUPS]` (numbers from `codes_ptr` on, int32)."""
    start = group[:, None] * (GROUP * BITS // 8)
    whole = live[:, None]
    if BITS == 8:
        codes = _bytes(codes_ptr + start, whole, GROUP)
    else:
        low = _bytes(codes_ptr + start, whole, GROUP // 2)
        codes = tl.reshape(tl.join(low & 15, low >> 4), (GROUPS, GROUP))
        if BITS == 6:
            high = _bytes(codes_ptr + start + GROUP // 2, whole, GROUP // 4)
            even = tl.join(high & 3, (high >> 4) & 3)
            odd = tl.join((high >> 2) & 3, high >> 6)
            codes |= tl.reshape(tl.join(even, odd), (GROUPS, GROUP)) << 4
    return (codes << (32 - BITS)) >> (32 - BITS)  # sign extension


@triton.jit
def _bytes(start_ptr, whole, COUNT: tl.constexpr):
    """COUNT neighbours from each place on."""
    column = tl.arange(0, COUNT)[None, :]
    return tl.load(start_ptr + column, mask=whole & (column >= 0), other=0).to(tl.int32)
