"""What the losses' kernels share: a program goes through a row of logits tile by tile.

A tile `[VECTORS, THREADS, LANES]` lies so that a thread has its own row `[:, thread, :]`: LANES are
neighbours, and its VECTORS lie THREADS * LANES apart. What is summed over a row is
kept as `[THREADS]`, each thread relative to a running maximum of its own. So no tile waits until
all threads agree; at the end of the row they do, once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# 8 warps, and of each tensor 32 bytes per thread: two programs on an SM, two tiles on their way
# while one is summed. That is 64 KB per SM, more than bandwidth times latency.
NUM_WARPS, THREAD_BYTES = 8, 32
THREADS = NUM_WARPS * 32
NEIGHBOURS = 8  # of which even a half precision result is 16 bytes
STAGES = tl.constexpr(3)
LOG2E = tl.constexpr(1.4426950408889634)
# In place of -inf as the maximum of nothing: a difference to it is a number.
LOWEST = tl.constexpr(-1e30)
_COMPILED = tl.constexpr(not triton.knobs.runtime.interpret)


@triton.jit
def exp2(x):
    """One instruction, to 2 ulp; 0 below 2^-126, where `tl.exp2` takes four to be exact."""
    if _COMPILED:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def reciprocal(x):
    """To 1 ulp."""
    if _COMPILED:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def widened(x):
    """In fp32. Of bf16, one instruction a number instead of one and a half."""
    if _COMPILED and x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
            *("=r,=r,r", [x]),
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    else:
        return x.to(tl.float32)


@triton.jit
def tile_offsets(VECTORS: tl.constexpr, THREADS: tl.constexpr, LANES: tl.constexpr):
    """Of the first tile."""
    thread = tl.arange(0, THREADS)[None, :, None] * LANES + tl.arange(0, LANES)[None, None, :]
    return tl.arange(0, VECTORS)[:, None, None] * (THREADS * LANES) + thread


@triton.jit
def thread_sums(x):
    """`[THREADS]`: each thread's own numbers of a tile."""
    return tl.sum(tl.sum(x, 2), 0)


@triton.jit
def thread_maxima(x):
    return tl.max(tl.max(x, 2), 0)


@triton.jit
def raised(top, highest, LOG2_UNIT: tl.constexpr):
    """Online maxima `[THREADS]`, at first `LOWEST`: (the new ones; what sums relative to the old
    are to be multiplied by). LOG2_UNIT: log2 of e^1, or 1 where they are log2s themselves."""
    new = tl.maximum(top, highest)
    return new, exp2((top - new) * LOG2_UNIT)


@triton.jit
def clear_row(
    row_ptr, WIDTH: tl.constexpr, VECTORS: tl.constexpr, THREADS: tl.constexpr, LANES: tl.constexpr
):
    """Zeros, for a row that does not count."""
    BLOCK: tl.constexpr = VECTORS * THREADS * LANES
    nothing = tl.zeros((BLOCK,), row_ptr.dtype.element_ty)
    for start in range(0, WIDTH, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        tl.store(row_ptr + offsets, nothing, mask=offsets < WIDTH)


def tile_shape(*logits: Tensor) -> dict[str, int]:
    """The tiles of rows that are read together. Where they do not all begin at 16 bytes, a thread's
    numbers lie apart and its neighbours' beside them: a warp still reads whole sectors."""
    numbers = THREAD_BYTES // max(x.dtype.itemsize for x in logits)
    odd = any(x.stride(0) % NEIGHBOURS or x.shape[1] % NEIGHBOURS for x in logits)
    lanes = 1 if odd else NEIGHBOURS
    return {"VECTORS": numbers // lanes, "THREADS": THREADS, "LANES": lanes}
