"""Group quantisation: pack, unpack, and the straight-through fake quantisation of training."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from latentwire_fast import reference
from latentwire_fast.errors import KernelError, PayloadError
from latentwire_fast.ops.dispatch import (
    FLOATS,
    check_float,
    check_shape,
    check_tensor,
    one_of,
    register,
    uses_triton,
)

# Of a code; the wire can carry values of 16 bits too (`config.schema.BITS`).
CODE_BITS = (8, 6, 4)
STEP_BITS = (*CODE_BITS, 3, 2)  # of what is rounded but not packed here
GROUP_SIZES = (16, 32, 64)


def _check_code(
    op: str, bits: int, group_size: int, *, allowed: tuple[int, ...] = CODE_BITS
) -> None:
    one_of(op, "bits", bits, allowed)
    one_of(op, "group_size", group_size, GROUP_SIZES)


def _flattened(op: str, z: Tensor) -> Tensor:
    """`[..., M, d]` to `[B, M*d]`."""
    check_float(op, "z", z, dims=2)
    return z.reshape(math.prod(z.shape[:-2]), z.shape[-2] * z.shape[-1])


def _quantize_pack(z: Tensor, bits: int, group_size: int, clip: bool) -> tuple[Tensor, Tensor]:
    if uses_triton("quantize_pack", z):
        from latentwire_fast.kernels import quantization as kernels

        length = reference.code_bytes(z.shape[1], bits=bits, group_size=group_size)
        codes, scales = kernels.quantize_pack(
            z, bits=bits, group_size=group_size, code_bytes=length, clip=clip
        )
    else:
        codes, scales = reference.quantize_pack(z, bits=bits, group_size=group_size, clip=clip)
    if scales.numel():
        _refuse_unwritable(z, scales.amax().item(), bits, clip)
    return codes, scales


def _refuse_unwritable(z: Tensor, largest_scale: float, bits: int, clip: bool) -> None:
    """Raise where codes and scales cannot stand for z.

    Either implementation marks a group with NaN or Inf by the scale NaN, which amax passes on. A
    group beyond the range has the largest scale there is, and so may one that ends just below it:
    only then is z looked at once more.
    """
    if not math.isfinite(largest_scale):
        raise PayloadError(
            "quantize_pack: z holds NaN or Inf; expected finite values (a payload has no others)"
        )
    if largest_scale < reference.LARGEST_FP16:
        return
    limit = reference.largest_value(bits, clip=clip)
    largest = z.float().abs().amax().item()
    if largest > limit:
        raise PayloadError(
            f"quantize_pack: z holds a value of magnitude {largest:.9g}; the largest that {bits} "
            f"bits can carry is {limit:.9g}: rescale it"
        )


def _quantize_pack_fake(z: Tensor, bits: int, group_size: int, clip: bool) -> tuple[Tensor, Tensor]:
    length = reference.code_bytes(z.shape[1], bits=bits, group_size=group_size)
    groups = -(-z.shape[1] // group_size)
    codes = z.new_empty((z.shape[0], length), dtype=torch.uint8)
    return codes, z.new_empty((z.shape[0], groups), dtype=torch.float16)


def _unpack_dequantize(
    codes: Tensor, scales: Tensor, bits: int, group_size: int, values: int, dtype: torch.dtype
) -> Tensor:
    unpack = reference.unpack_dequantize
    if uses_triton("unpack_dequantize", codes):
        from latentwire_fast.kernels import quantization as kernels

        unpack = kernels.unpack_dequantize
    return unpack(codes, scales, bits=bits, group_size=group_size, values=values, dtype=dtype)


def _unpack_dequantize_fake(
    codes: Tensor, scales: Tensor, bits: int, group_size: int, values: int, dtype: torch.dtype
) -> Tensor:
    return codes.new_empty((codes.shape[0], values), dtype=dtype)


def _fake_quantize(z: Tensor, bits: int, group_size: int, clip: bool) -> Tensor:
    quantize = reference.fake_quantize
    if uses_triton("fake_quantize", z):
        from latentwire_fast.kernels import quantization as kernels

        quantize = kernels.fake_quantize
    return quantize(z, bits=bits, group_size=group_size, clip=clip)


register(
    "quantize_pack(Tensor z, int bits, int group_size, bool clip) -> (Tensor, Tensor)",
    _quantize_pack,
    _quantize_pack_fake,
)
register(
    "unpack_dequantize(Tensor codes, Tensor scales, int bits, int group_size, SymInt values, "
    "ScalarType dtype) -> Tensor",
    _unpack_dequantize,
    _unpack_dequantize_fake,
)
register(
    "fake_quantize(Tensor z, int bits, int group_size, bool clip) -> Tensor",
    _fake_quantize,
    lambda z, bits, group_size, clip: torch.empty_like(z, memory_format=torch.contiguous_format),
)


class _FakeQuantize(torch.autograd.Function):
    """Straight-through: the gradient is the identity. No value below 65504 * qmax, clipped or not,
    ends more than half a step away."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, bits: int, group_size: int, clip: bool) -> Tensor:
        return torch.ops.latentwire_fast.fake_quantize(z, bits, group_size, clip)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return grad, None, None, None


def quantize_pack(
    z: Tensor, *, bits: int, group_size: int, clip: bool = False
) -> tuple[Tensor, Tensor]:
    """Quantise the last two dimensions, flattened, in groups; pack the codes into bytes.

    The byte layout is `reference.code_bytes`'s, the formula `reference.quantize`'s. The result is
    the same, bit for bit, on every device. No gradient.

    Args:
        z: `[..., M, d]`, floating point, finite.
        bits: 8, 6 or 4.
        group_size: 16, 32 or 64 consecutive values share a scale; the last group may be short.
        clip: steps of amax / (qmax + 1/2) instead of amax / qmax, no longer idempotent. Takes 4 %
            (groups of 32) or 9 % (64) off the squared error of normal values at 4 bits, and adds
            to it elsewhere. The receiver need not know.

    Returns:
        `(codes [..., code_bytes(M*d)] uint8, scales [..., ceil(M*d / group_size)] fp16)`.

    Raises:
        ConfigError: bits or group size; KernelError: shape or dtype; PayloadError: z holds NaN or
        Inf, or a value beyond `reference.largest_value`, 65504 times the largest code.
    """
    _check_code("quantize_pack", bits, group_size)
    flat = _flattened("quantize_pack", z).detach()
    codes, scales = torch.ops.latentwire_fast.quantize_pack(flat, bits, group_size, clip)
    lead = z.shape[:-2]
    return codes.reshape(*lead, codes.shape[1]), scales.reshape(*lead, scales.shape[1])


def check_packed(
    op: str,
    codes: Tensor,
    scales: Tensor,
    *,
    bits: int,
    group_size: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    """That codes and scales are those of a latent of this shape `(..., M, d)`."""
    _check_code(op, bits, group_size)
    check_tensor(op, "codes", codes)
    check_tensor(op, "scales", scales)
    whole = isinstance(shape, (tuple, list)) and all(
        isinstance(size, (int, torch.SymInt)) for size in shape
    )
    if not whole or len(shape) < 2 or min(shape) < 0:
        raise KernelError(f"{op}: shape is {shape!r}; expected whole numbers (..., M, d)")
    if codes.dtype != torch.uint8 or scales.dtype != torch.float16 or dtype not in FLOATS:
        raise KernelError(
            f"{op}: codes, scales and result are {codes.dtype}, {scales.dtype} and {dtype}; "
            "expected torch.uint8, torch.float16 and a floating-point dtype"
        )
    lead, values = tuple(shape[:-2]), shape[-2] * shape[-1]
    length = reference.code_bytes(values, bits=bits, group_size=group_size)
    check_shape(op, "codes", codes, (*lead, length), codes)
    check_shape(op, "scales", scales, (*lead, -(-values // group_size)), codes)


def unpack_dequantize(
    codes: Tensor,
    scales: Tensor,
    *,
    bits: int,
    group_size: int,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Unpack what `quantize_pack` packed, and multiply by the scales (in fp32).

    Args:
        codes: `[..., code_bytes(M*d)]` uint8.
        scales: `[..., ceil(M*d / group_size)]` fp16.
        shape: of the result, `(..., M, d)`.
        dtype: of the result.

    Raises:
        ConfigError: bits or group size; KernelError: sizes or dtypes that do not fit `shape`.
    """
    op = "unpack_dequantize"
    check_packed(op, codes, scales, bits=bits, group_size=group_size, shape=shape, dtype=dtype)
    batch = math.prod(shape[:-2])
    z = torch.ops.latentwire_fast.unpack_dequantize(
        codes.reshape(batch, codes.shape[-1]),
        scales.reshape(batch, scales.shape[-1]),
        bits,
        group_size,
        shape[-2] * shape[-1],
        dtype,
    )
    return z.reshape(shape)


def fake_quantize(z: Tensor, *, bits: int, group_size: int, clip: bool = False) -> Tensor:
    """What a payload's receiver would get for z, in z's shape and dtype; straight-through gradient.

    A group that holds NaN or Inf comes out as NaN: training's guard on the loss sees it. Values
    beyond `reference.largest_value`, which `quantize_pack` refuses, end at it: finding them would
    wait for the GPU at every step.

    Raises:
        ConfigError: bits or group size; KernelError: shape or dtype.
    """
    _check_code("fake_quantize", bits, group_size, allowed=STEP_BITS)
    flat = _flattened("fake_quantize", z)
    return _FakeQuantize.apply(flat, bits, group_size, clip).reshape(z.shape)
