"""K1 against eager torch, torch.compile and bitsandbytes: pack, unpack, fake-quantise.

pytest bench/bench_quantize.py --benchmark-only
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import DEVICE, DTYPE, measure, shapes, worst
from torch import Tensor

from latentwire_fast import ops, reference

GROUP = 32
# (batch, M, d_z): a batch of paper-sized latents, and one that fills the memory bus.
SHAPES = shapes([(8, 32, 256), (2048, 256, 256)], [(2, 8, 64)])


def packing(row: str, bits: int, flat: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    """One row's way to quantise and pack `[B, n]`."""
    if row == "ours":
        if DEVICE == "cpu":
            return lambda: ops.quantize_pack(flat[:, None], bits=bits, group_size=GROUP)
        from latentwire_fast.kernels import quantize

        length = reference.code_bytes(flat.shape[1], bits=bits, group_size=GROUP)
        return lambda: quantize.quantize_pack(flat, bits=bits, group_size=GROUP, code_bytes=length)
    if row == "eager":
        return lambda: reference.quantize_pack(flat, bits=bits, group_size=GROUP)
    if row == "compile":
        compiled = torch.compile(reference.quantize_pack, mode="max-autotune-no-cudagraphs")
        return lambda: compiled(flat, bits=bits, group_size=GROUP)
    functional = pytest.importorskip("bitsandbytes").functional
    return lambda: functional.quantize_4bit(flat, blocksize=64, quant_type="fp4")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", ops.BITS)
@pytest.mark.parametrize("row", ["ours", "eager", "compile", "bitsandbytes"])
def test_quantize_pack(benchmark: Any, row: str, bits: int, shape: tuple[int, int, int]) -> None:
    if row != "ours" and row != "eager" and DEVICE == "cpu":
        pytest.skip("compared on a GPU only")
    if row == "bitsandbytes" and bits != 4:
        pytest.skip("4 bits only")
    batch, latents, width = shape
    flat = torch.randn(batch, latents * width, device=DEVICE, dtype=DTYPE)
    call = packing(row, bits, flat)
    error = 0.0
    if row != "bitsandbytes":  # another code: nothing to be equal to
        found, truth = call(), reference.quantize_pack(flat.cpu(), bits=bits, group_size=GROUP)
        same = [torch.equal(f.cpu(), t) for f, t in zip(found, truth, strict=True)]
        error = float(not all(same))
    traffic = flat.numel() * (flat.element_size() + bits / 8 + 2 / GROUP)
    measure(benchmark, call, error=error, allowed=0.0, traffic=traffic)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", ops.BITS)
@pytest.mark.parametrize("row", ["ours", "eager"])
def test_unpack_dequantize(
    benchmark: Any, row: str, bits: int, shape: tuple[int, int, int]
) -> None:
    z = torch.randn(shape)
    codes, scales = ops.quantize_pack(z, bits=bits, group_size=GROUP)
    truth = ops.fake_quantize(z, bits=bits, group_size=GROUP)
    codes, scales = codes.to(DEVICE), scales.to(DEVICE)

    def call() -> Tensor:
        with ops.backend("auto" if row == "ours" else "reference"):
            return ops.unpack_dequantize(
                codes, scales, bits=bits, group_size=GROUP, shape=shape, dtype=DTYPE
            )

    error = worst(call().cpu(), truth.to(DTYPE))
    traffic = z.numel() * (DTYPE.itemsize + bits / 8 + 2 / GROUP)
    measure(benchmark, call, error=error, allowed=0.0, traffic=traffic)
