"""A latent to the bytes of a payload, and back.

Shapes: `B` payloads, `M` latents, `D` latent width `d_z`, `G` groups, `c` code bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from latentwire_fast import ops
from latentwire_fast.errors import PayloadError
from latentwire_fast.reference import largest_value
from latentwire_fast.wire.header import HEADER_BYTES, Header, check_frame, located, seal

# As signed words: negative fp16 numbers are negative words, NaN is above infinity.
_FP16_INFINITY, _FP16_MINUS_ZERO = 0x7C00, -0x8000


# --- latent to payload ----------------------------------------------------------------------------


def pack(latent_MD: Tensor, *, bits: int, group_size: int, fingerprint: int = 0) -> bytes:
    """The payload of one latent.

    Args:
        latent_MD: floating point, finite, on any device. Computed on as fp32.
        bits: 16, 8, 6 or 4 per value.
        group_size: 16, 32 or 64 values per scale. 16 bits have no scales and ignore it.
        fingerprint: 16 bits that name the interlingua; 0 for none.

    Raises:
        PayloadError: not a `[M, d_z]` tensor of floats with M and d_z from 1 to 65,535; NaN or
            Inf; a value beyond what the bits can carry (65504 at 16 bits; 65504 times the largest
            code, 127, 31 or 7, at 8, 6 or 4 bits); bits, group size or fingerprint out of range.
    """
    require_latent(latent_MD, dims="[M, d_z]")
    return _pack(latent_MD.unsqueeze(0), bits, group_size, fingerprint)[0]


def pack_batch(
    latent_BMD: Tensor, *, bits: int, group_size: int, fingerprint: int = 0
) -> list[bytes]:
    """One payload per latent, quantised together on the latents' device, so that only bytes leave
    it; otherwise like `pack`."""
    require_latent(latent_BMD, dims="[B, M, d_z]")
    return _pack(latent_BMD, bits, group_size, fingerprint)


def require_latent(latent: Tensor, *, dims: str) -> None:
    """Raise unless this is a finite tensor of floats with these dimensions, such as `[M, d_z]`.

    Raises:
        PayloadError: it is not.
    """
    if not isinstance(latent, Tensor) or not latent.is_floating_point():
        kind = latent.dtype if isinstance(latent, Tensor) else type(latent).__name__
        raise PayloadError(f"a latent is a tensor of floats, got {kind}; convert it first")
    shape = list(latent.shape)
    if len(shape) != dims.count(",") + 1:
        raise PayloadError(f"expected a latent {dims}, got {shape}; reshape it or pick from it")
    _require_finite(latent.detach(), latent.detach(), "has training diverged?")


def require_range(fits: Tensor, latent: Tensor, bits: int) -> None:
    """Raise unless all values of a latent fit.

    Raises:
        PayloadError: one is too large for these bits.
    """
    if not fits.all():
        where = (~fits).nonzero()[0].tolist()
        value, advice = latent[tuple(where)].item(), "rescale it, or take another width"
        raise PayloadError(f"the latent at {where} is {value}, beyond {bits} bits; {advice}")


def _require_finite(converted: Tensor, latent: Tensor, advice: str) -> None:
    finite = converted.isfinite()
    if not finite.all():
        where = (~finite).nonzero()[0].tolist()
        value = latent[tuple(where)].item()
        raise PayloadError(f"the latent at {where} is {value}, which it cannot carry; {advice}")


def _pack(latent_BMD: Tensor, bits: int, group_size: int, fingerprint: int) -> list[bytes]:
    _, latents, d_z = latent_BMD.shape
    group_size = 0 if bits == 16 else group_size
    header = Header(
        bits=bits, latents=latents, d_z=d_z, group_size=group_size, fingerprint=fingerprint
    )
    latent_BMD = latent_BMD.detach()
    single_BMD = latent_BMD.float()
    _require_finite(single_BMD, latent_BMD, "rescale it into the range of fp32")
    if bits == 16:
        half_BMD = single_BMD.half() + 0.0  # one byte string per value: -0.0 becomes 0.0
        _require_finite(half_BMD, latent_BMD, "rescale it below 65504, or take 8 bits")
        return [seal(header, body) for body in _rows(half_BMD)]
    largest = largest_value(bits)
    within_BMD = single_BMD.masked_fill(single_BMD.abs() > largest, torch.inf)
    _require_finite(
        within_BMD, latent_BMD, f"rescale it to at most {largest:.0f}, the largest at {bits} bits"
    )
    codes_Bc, scales_BG = _quantize_twice(single_BMD, header)
    return [
        seal(header, codes + scales)
        for codes, scales in zip(_rows(codes_Bc), _rows(scales_BG), strict=True)
    ]


def _quantize_twice(latent_BMD: Tensor, header: Header) -> tuple[Tensor, Tensor]:
    """Codes and scales that quantising what they stand for gives again.

    Once is not always enough: scales below fp16's normal range have few digits, and codes rounded
    with one can ask for the next smaller one. The second result is a fixed point, and the first
    for all groups with a value above 1e-3 (`docs/wire_format.md` has the proof).
    """
    codes_Bc, scales_BG = _quantize(latent_BMD, header)
    return _quantize(dequantize(codes_Bc, scales_BG, header), header)


def _quantize(latent_BMD: Tensor, header: Header) -> tuple[Tensor, Tensor]:
    return ops.quantize_pack(latent_BMD, bits=header.bits, group_size=header.group_size)


def _rows(tensor: Tensor) -> list[bytes]:
    """The little-endian bytes of each row."""
    array = tensor.cpu().numpy()
    return [row.tobytes() for row in array.astype(array.dtype.newbyteorder("<"), copy=False)]


# --- payload to latent ----------------------------------------------------------------------------


def unpack(payload: bytes) -> tuple[Tensor, Header]:
    """The latent `[M, d_z]`, fp32 on the CPU, and the header of one payload.

    Raises:
        PayloadError: anything but the exact bytes that `pack` writes for some latent.
    """
    header = check_frame(payload)
    return _decode([payload], header)[0], header


def unpack_batch(
    payloads: Sequence[bytes], *, device: torch.device | str = "cpu"
) -> tuple[Tensor, list[Header]]:
    """Latents `[B, M, d_z]` fp32 and headers of payloads of one layout.

    Args:
        device: where the latents shall be. The bytes are moved there and unpacked and checked by
            it; latents and refusals are the same on every device.

    Raises:
        PayloadError: no payloads; one that `unpack` refuses (the message has its index); two that
            differ in M, d_z, bits or group size. Fingerprints may differ: the caller knows which
            one to expect.
    """
    headers = []
    for i, payload in enumerate(payloads):
        with located(f"payload {i}"):
            headers.append(check_frame(payload))
    if not headers:
        raise PayloadError("no payloads to unpack; give at least one")
    layouts = [(h.latents, h.d_z, h.bits, h.group_size) for h in headers]
    for i, layout in enumerate(layouts):
        if layout != layouts[0]:
            raise PayloadError(
                f"payload {i} has (M, d_z, bits, group size) {layout}, payload 0 has {layouts[0]}; "
                "unpack payloads of different layouts one by one"
            )
    return _decode(payloads, headers[0], device), headers


def split_bodies(payloads: Sequence[bytes], header: Header) -> tuple[np.ndarray, np.ndarray]:
    """The bytes behind the headers of payloads with this layout, cut in two.

    Returns:
        Codes `[B, c]` uint8, at 16 bits the bytes of the values themselves; scales `[B, G]` fp16,
        G = 0 at 16 bits.
    """
    bodies = bytearray().join(memoryview(payload)[HEADER_BYTES:] for payload in payloads)
    body_Bc = np.frombuffer(bodies, np.uint8).reshape(len(payloads), header.body_bytes)
    codes_Bc, scales_Bc = np.split(body_Bc, [header.code_bytes], 1)
    # copied, because scales may start at an odd address
    return np.ascontiguousarray(codes_Bc), scales_Bc.copy().view("<f2")


def dequantize(codes_Bc: Tensor, scales_BG: Tensor, header: Header) -> Tensor:
    """Latents `[B, M, d_z]` fp32 of what `split_bodies` gives, on the device where that is. Values
    are taken as they are: `unpack_batch` checks them."""
    shape = (len(codes_Bc), header.latents, header.d_z)
    if header.bits == 16:
        return codes_Bc.view(torch.float16).view(shape).float()
    return ops.unpack_dequantize(
        codes_Bc,
        scales_BG,
        bits=header.bits,
        group_size=header.group_size,
        shape=shape,
        dtype=torch.float32,
    )


def _decode(
    payloads: Sequence[bytes], header: Header, device: torch.device | str = "cpu"
) -> Tensor:
    """Latents `[B, M, d_z]` of payloads with this layout whose frames were checked."""
    codes, scales = split_bodies(payloads, header)
    if header.bits == 16:  # numbers of this machine's byte order, which need not be the wire's
        codes = codes.view("<f2").astype(np.float16, copy=False).view(np.uint8)
    codes_Bc = torch.from_numpy(codes).to(device)
    scales_BG = torch.from_numpy(scales.astype(np.float16, copy=False)).to(device)
    if header.bits == 16:
        words_Bn = codes_Bc.view(torch.int16)
        unwritten = ((words_Bn & 0x7FFF) >= _FP16_INFINITY) | (words_Bn == _FP16_MINUS_ZERO)
        _refuse(unwritten, "value {} is NaN, infinite or -0.0")
        return dequantize(codes_Bc, scales_BG, header)
    words_BG = scales_BG.view(torch.int16)
    unwritten = (words_BG >= _FP16_INFINITY) | (words_BG < 0)
    _refuse(unwritten, "the scale of group {} is NaN, infinite or has its sign set")
    latent_BMD = dequantize(codes_Bc, scales_BG, header)
    # Clamped, since codes out of range under the largest scale stand for what cannot be quantised.
    largest = largest_value(header.bits)
    again_Bc, again_BG = _quantize(latent_BMD.clamp(-largest, largest), header)
    _refuse(again_BG != scales_BG, "the scale of group {} is not the one its codes ask for")
    _refuse(again_Bc != codes_Bc, "code byte {} is out of range or has padding set")
    return latent_BMD


def _refuse(unwritten_Bn: Tensor, what: str) -> None:
    """Raise when anything is set in `unwritten_Bn`, which marks what `pack` never writes."""
    if unwritten_Bn.any():
        row, column = unwritten_Bn.nonzero()[0].tolist()
        place = f"payload {row}: " if len(unwritten_Bn) > 1 else ""
        raise PayloadError(
            f"{place}{what.format(column)}, which no latent is packed to; the CRC is right, so it "
            "was sent like this: check what wrote it"
        )
