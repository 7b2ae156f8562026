"""Group quantisation (K1 of docs/kernels.md) against eager torch, torch.compile and bitsandbytes.

Pack, unpack, fake-quantise:

pytest bench/kernels/bench_quantize.py --benchmark-only
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.kernels.ceilings import Stage
from bench.kernels.clocks import Call, Inputs
from bench.kernels.harness import (
    AUTOTUNED,
    DEVICE,
    Case,
    Forward,
    Row,
    compiled,
    dtype_of,
    grid,
    library,
    report_row,
)
from bench.kernels.records import Errors
from latentwire_fast import ops, reference

GROUP = 32
# (batch, values): a batch of paper-sized latents, and 268 MB of bf16, which fill the memory bus.
PAPER, LARGE = (8, 32 * 256), (2048, 256 * 256)
SMALL = (2, 8 * 64)
# What no correct use of the code FP4 exceeds, as a share of a block's largest value: half of its
# widest gap, 2/3 to 1.
FP4_HALF_GAP, FP4_BLOCK = 1 / 6, 64
# torch.compile divides approximately: some ties fall to the other side. On an H100 more do than
# this at 8 bits (0.8% of the codes) and in the fake quantiser (up to 4.4%): rows not timed.
OTHER_CODES = 1e-3


def code_of(bits: int) -> dict[str, int]:
    return {"bits": bits, "group_size": GROUP}


def different(found: Any, inputs: Inputs, truth: Any) -> Errors:
    """The share of numbers (of outputs that may be several) that are not the reference's."""
    pairs = zip(*((t,) if isinstance(t, torch.Tensor) else t for t in (found, truth)), strict=True)
    return {"codes": max((f != t).double().mean().item() for f, t in pairs)}


def rows_of(
    shape: tuple[int, int], ours: Forward, plain: Forward, bnb: Row | None
) -> dict[str, Row]:
    """The rows of an operation on all of its inputs."""

    def star(make: Callable[[], Forward]) -> Callable[[], Call]:
        def prepare() -> Call:
            forward = make()
            return lambda inputs: forward(*inputs)

        return prepare

    rows = {
        "ours": Row(star(lambda: ours), {"codes": 0.0}),
        "eager": Row(star(lambda: plain), {"codes": 0.0}),
        "compile": Row(star(lambda: compiled(plain)), {"codes": OTHER_CODES}),
    }
    if shape != LARGE:  # there the memory bus decides, and tuning takes the time of other cases
        tuned = star(lambda: compiled(plain, mode=AUTOTUNED))
        rows[AUTOTUNED] = Row(tuned, {"codes": OTHER_CODES})
    return rows if bnb is None else {**rows, "bitsandbytes": bnb}


def latent(shape: tuple[int, int], dtype: torch.dtype) -> Inputs:
    return (torch.randn(shape, device=DEVICE).to(dtype),)


def stage_of(shape: tuple[int, int], bits: int, dtype: torch.dtype) -> Stage:
    """One launch that moves the values, their codes and their scales, each once."""
    return Stage(shape[0] * shape[1] * (dtype.itemsize + bits / 8 + 2 / GROUP))


def pack_case(shape: tuple[int, int], bits: int, dtype: torch.dtype) -> Case:
    code = code_of(bits)

    def plain(z: torch.Tensor) -> Any:
        return reference.quantize_pack(z, **code)

    def ours(z: torch.Tensor) -> Any:
        if DEVICE == "cpu":
            return ops.quantize_pack(z[:, None], **code)
        # Without the op's check for NaN, which waits for the GPU, so that a graph can record it.
        from latentwire_fast.kernels import quantization

        length = reference.code_bytes(shape[1], **code)
        return quantization.quantize_pack(z, **code, code_bytes=length)

    def bitsandbytes() -> Call:
        functional = library("bitsandbytes.functional")
        return lambda inputs: functional.quantize_4bit(
            inputs[0], blocksize=FP4_BLOCK, quant_type="fp4"
        )

    def reconstruction(found: Any, inputs: Inputs, truth: Any) -> Errors:
        z = inputs[0].float().view(-1, FP4_BLOCK)
        back = library("bitsandbytes.functional").dequantize_4bit(*found).float()
        largest = z.abs().amax(1, keepdim=True).clamp(min=1e-30)
        return {"values": ((back.view_as(z) - z).abs() / largest).max().item()}

    bnb = Row(bitsandbytes, {"values": FP4_HALF_GAP + 0.01}, reconstruction)
    stage = stage_of(shape, bits, dtype)
    return Case(
        *("K1", f"pack, {bits} bits", shape, dtype, stage, (stage,)),
        inputs=lambda: latent(shape, dtype),
        truth=lambda inputs: reference.quantize_pack(inputs[0], **code),
        errors=different,
        part=f"{bits} bits",
        rows=rows_of(shape, ours, plain, bnb if bits == 4 else None),
    )


def unpack_case(shape: tuple[int, int], bits: int, dtype: torch.dtype) -> Case:
    code = code_of(bits)
    batch, values = shape

    def ours(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        out = ops.unpack_dequantize(codes, scales, **code, shape=(batch, 1, values), dtype=dtype)
        return out.view(shape)

    def plain(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return reference.unpack_dequantize(codes, scales, **code, values=values, dtype=dtype)

    def bitsandbytes() -> Call:
        functional = library("bitsandbytes.functional")
        z = latent(shape, dtype)[0]
        packed, state = functional.quantize_4bit(z, blocksize=FP4_BLOCK, quant_type="fp4")
        # Its own code of other values: copies of our inputs would be nothing to it.
        return lambda inputs: functional.dequantize_4bit(packed, state)

    def finite(found: Any, inputs: Inputs, truth: Any) -> Errors:
        return {"values": float(not found.isfinite().all())}

    bnb = Row(bitsandbytes, {"values": 0.0}, finite)
    stage = stage_of(shape, bits, dtype)
    return Case(
        *("K1", f"unpack, {bits} bits", shape, dtype, stage, (stage,)),
        inputs=lambda: reference.quantize_pack(latent(shape, dtype)[0], **code),
        truth=lambda inputs: plain(*inputs),
        errors=different,
        part=f"{bits} bits",
        rows=rows_of(shape, ours, plain, bnb if bits == 4 and shape != PAPER else None),
    )


def fake_case(shape: tuple[int, int], bits: int, dtype: torch.dtype) -> Case:
    code = code_of(bits)

    def ours(z: torch.Tensor) -> torch.Tensor:
        return ops.fake_quantize(z[:, None], **code)[:, 0]

    def plain(z: torch.Tensor) -> torch.Tensor:
        return reference.fake_quantize(z, **code)

    stage = Stage(2 * shape[0] * shape[1] * dtype.itemsize)
    return Case(
        *("K1", f"fake-quantise, {bits} bits", shape, dtype, stage, (stage,)),
        inputs=lambda: latent(shape, dtype),
        truth=lambda inputs: plain(*inputs),
        errors=different,
        part=f"{bits} bits",
        rows=rows_of(shape, ours, plain, None),
    )


def cases(*, gpu: bool = DEVICE == "cuda") -> list[Case]:
    """Every operation at every width, the paper's first."""
    makers = (pack_case, unpack_case, fake_case)
    shapes = (LARGE, PAPER) if gpu else (SMALL,)
    return [make(s, bits, dtype_of(gpu)) for bits in (4, 8, 6) for s in shapes for make in makers]


@pytest.mark.parametrize(**grid(cases()))
def test_quantize(benchmark: Any, case: Case, row: str) -> None:
    report_row(benchmark, case, row)
