"""Group quantisation, and the layout of its codes in bytes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

LARGEST_FP16 = 65504.0


def largest_code(bits: int) -> int:
    """The largest code, qmax; the smallest is its negative."""
    return 2 ** (bits - 1) - 1


def largest_value(bits: int, *, clip: bool = False) -> float:
    """The largest magnitude that codes carry: with the largest scale, fp16's 65504.

    The largest code's value, or with `clip` half a step more, which is clamped to it. What is
    larger would come out as that code without a word.
    """
    return LARGEST_FP16 * (largest_code(bits) + (0.5 if clip else 0.0))


def code_bytes(values: int, *, bits: int, group_size: int) -> int:
    """Bytes of the packed codes of `values` numbers.

    Groups follow one another, each byte aligned. A group of r values takes r bytes at 8 bits and
    ceil(r/2) at 4 bits; at 6 bits a plane of the codes' low 4 bits, ceil(r/2) bytes, and then a
    plane of their high 2 bits, ceil(r/4) bytes. Only the last group can have r < group_size.
    """

    def group(r: int) -> int:
        return {8: r, 4: -(-r // 2), 6: -(-r // 2) + -(-r // 4)}[bits]

    # No divmod: `values` is symbolic when shapes are traced.
    return values // group_size * group(group_size) + group(values % group_size)


def quantize(
    z_Bn: Tensor, *, bits: int, group_size: int, clip: bool = False
) -> tuple[Tensor, Tensor]:
    """Symmetric group quantisation: `(codes [B, G, g] int8, scales [B, G] fp16)`.

    `scale = fp16(min(amax / qmax, 65504))`, `code = clamp(round_half_even(z / scale), -qmax, qmax)`
    with the rounded scale and `qmax = 2**(bits - 1) - 1`; scale 0 gives codes 0. A short last group
    is filled up with zeros. A group that holds NaN or Inf gets the scale NaN.

    With `clip` the divisor is `qmax + 1/2` (7.5 at 4 bits): steps are finer, and the largest values
    are clamped to a code half a step away, no further than rounding takes any other value.

    Without clip, quantising what was dequantised gives the same again, except where fp16's
    subnormals round the scale too coarsely for its largest code to be qmax: scales below qmax *
    2**-24, that is groups whose largest value is under qmax**2 * 2**-24 (1e-3 at 8 bits, 3e-6 at
    4).
    """
    qmax = largest_code(bits)
    padding = -z_Bn.shape[-1] % group_size
    z = F.pad(z_Bn.float(), (0, padding)) if padding else z_Bn.float()
    z = z.reshape(*z.shape[:-1], z.shape[-1] // group_size, group_size)
    amax = z.abs().amax(-1)
    # By a tensor: by a number, a GPU multiplies with the reciprocal, and some scales come out else.
    steps = amax.new_full((), qmax + 0.5 if clip else qmax)
    scale = (amax / steps).clamp(max=LARGEST_FP16)
    scale = scale.masked_fill(~amax.isfinite(), torch.nan)
    scales = scale.to(torch.float16)
    step = scales.float().unsqueeze(-1)
    codes = torch.where(step > 0, z / step, 0.0).round().clamp(-qmax, qmax)
    return codes.to(torch.int8), scales


def _join(parts: Tensor, *, per_byte: int) -> Tensor:
    """Put `per_byte` neighbours (last dim, each below `2**(8 // per_byte)`) in a byte."""
    parts = parts.reshape(*parts.shape[:-1], parts.shape[-1] // per_byte, per_byte)
    # No two parts have a bit in common: their sum is what "or" gives.
    return (parts << _shifts(parts, per_byte)).sum(-1, dtype=torch.uint8)


def _split(packed: Tensor, *, per_byte: int) -> Tensor:
    """The inverse of `_join`."""
    parts = packed.unsqueeze(-1) >> _shifts(packed, per_byte)
    return (parts & (2 ** (8 // per_byte) - 1)).flatten(-2)


def _shifts(like: Tensor, per_byte: int) -> Tensor:
    """`[per_byte]`: by how many bits the values in a byte are shifted."""
    return torch.arange(0, 8, 8 // per_byte, dtype=torch.uint8, device=like.device)


def pack_codes(codes_BGg: Tensor, *, values: int, bits: int) -> Tensor:
    """Two's complement codes `[B, G, g]` int8 to bytes `[B, code_bytes]`, laid out as that says.

    Within a byte the first value has the lowest bits; unused bits are zero.
    """
    codes = codes_BGg.view(torch.uint8)
    if bits == 8:
        return codes.flatten(-2)[..., :values]
    low = _join(codes & 15, per_byte=2)
    if bits == 4:
        return low.flatten(-2)[..., : -(-values // 2)]
    high = _join((codes >> 4) & 3, per_byte=4)
    full, rest = divmod(values, codes.shape[-1])
    planes = torch.cat((low[..., :full, :], high[..., :full, :]), -1).flatten(-2)
    if not rest:
        return planes
    tail = low[..., full, : -(-rest // 2)], high[..., full, : -(-rest // 4)]
    return torch.cat((planes, *tail), -1)


def unpack_codes(codes_Bb: Tensor, *, values: int, bits: int, group_size: int) -> Tensor:
    """Bytes `[B, code_bytes]` to codes `[B, n]` int8; the inverse of `pack_codes`."""
    if bits == 8:
        return codes_Bb.view(torch.int8)
    if bits == 4:
        codes = _split(codes_Bb, per_byte=2)[..., :values]
    else:
        full, rest = divmod(values, group_size)
        cut = full * group_size * 6 // 8
        groups = codes_Bb[..., :cut].unflatten(-1, (full, group_size * 6 // 8))
        half = group_size // 2
        low = _split(groups[..., :half], per_byte=2).flatten(-2)
        high = _split(groups[..., half:], per_byte=4).flatten(-2)
        middle = cut + -(-rest // 2)
        low = torch.cat((low, _split(codes_Bb[..., cut:middle], per_byte=2)[..., :rest]), -1)
        high = torch.cat((high, _split(codes_Bb[..., middle:], per_byte=4)[..., :rest]), -1)
        codes = low | (high << 4)
    # Sign extension: shift the code's top bit into the byte's, and back arithmetically.
    return (codes << (8 - bits)).view(torch.int8) >> (8 - bits)


def quantize_pack(
    z_Bn: Tensor, *, bits: int, group_size: int, clip: bool = False
) -> tuple[Tensor, Tensor]:
    """`(packed codes [B, code_bytes] uint8, scales [B, G] fp16)`."""
    codes, scales = quantize(z_Bn, bits=bits, group_size=group_size, clip=clip)
    return pack_codes(codes, values=z_Bn.shape[-1], bits=bits).contiguous(), scales


def unpack_dequantize(
    codes_Bb: Tensor,
    scales_BG: Tensor,
    *,
    bits: int,
    group_size: int,
    values: int,
    dtype: torch.dtype,
) -> Tensor:
    """`code * scale` in fp32, `[B, n]` in `dtype`."""
    codes = unpack_codes(codes_Bb, values=values, bits=bits, group_size=group_size).float()
    steps = scales_BG.float().repeat_interleave(group_size, -1)[..., :values]
    return (codes * steps).to(dtype)


def fake_quantize(z_Bn: Tensor, *, bits: int, group_size: int, clip: bool = False) -> Tensor:
    """`unpack_dequantize(quantize_pack(z))` in z's dtype; a group with NaN or Inf becomes NaN."""
    codes, scales = quantize(z_Bn, bits=bits, group_size=group_size, clip=clip)
    values = (codes.float() * scales.float().unsqueeze(-1)).flatten(-2)
    return values[..., : z_Bn.shape[-1]].to(z_Bn.dtype).contiguous()
