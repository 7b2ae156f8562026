"""Elementwise functions that several kernels share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """Exact to relative rounding for small x too: a calibration or a difference may enlarge it."""
    square = x * x
    series = 2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835))
    series = x + x * square * (-1.0 / 3 + square * series)
    return tl.where(tl.abs(x) < 0.25, series, 2.0 * tl.sigmoid(2.0 * x) - 1.0)


@triton.jit
def tanh_approximate(x):
    """One instruction, off by at most 2^-10.98 of its value: less than a bf16's rounding, and the
    last bit of an fp16. Not interpreted."""
    return tl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
    )
