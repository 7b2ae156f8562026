"""Payloads: a latent as bytes, and back. `docs/wire_format.md` specifies the format.

    >>> payload = pack(latent_MD, bits=6, group_size=32)  # len(payload) is what the wire carries
    >>> latent_MD, header = unpack(payload)

A payload is a 16-byte header, packed codes, and one fp16 scale per group (at 16 bits: fp16 values
alone). It is canonical: `pack` turns what `unpack` accepts back into the same bytes, so payloads
are equal exactly when headers and latents are. Bytes from outside are checked in this order:
header, total length, CRC-32, values. Nothing that grows with what a header claims is allocated
before the bytes given are known to have that length.

Shapes: `B` payloads, `M` latents, `D` latent width `d_z`, `G` groups, `c` code bytes.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import brotli
import numpy as np
import torch
from torch import Tensor

from latentwire_fast import ops
from latentwire_fast.errors import PayloadError
from latentwire_fast.reference import code_bytes

MAGIC = b"LW"
VERSION = 1
BITS = (16, *ops.BITS)
HEADER_BYTES = 16
# magic, version, bits, M, d_z, group size, reserved, fingerprint; then the CRC
_FIELDS, _CRC = struct.Struct("<2sBBHHBBH"), struct.Struct("<I")
_U16_MAX = 0xFFFF
# As unsigned words; what is not below fp16's infinity is Inf, NaN, -0.0 or negative.
_FP16_INFINITY, _FP16_MINUS_ZERO = 0x7C00, 0x8000


@dataclass(frozen=True, kw_only=True)
class Header:
    """What the first 16 bytes say (the CRC apart). One that exists is valid.

    Attributes:
        bits: bits per value: 16, 8, 6 or 4.
        latents: M, 1 to 65,535.
        d_z: latent width, 1 to 65,535.
        group_size: values per scale: 16, 32 or 64; 0 at 16 bits, which has no scales.
        fingerprint: 16 bits that name the interlingua the latent belongs to; 0 for none.
        version: of the format.

    Raises:
        PayloadError: a field outside its range.
    """

    bits: int
    latents: int
    d_z: int
    group_size: int
    fingerprint: int = 0
    version: int = VERSION

    def __post_init__(self) -> None:
        if self.version != VERSION:
            raise PayloadError(
                f"payload format version {self.version} is unknown, this release reads version "
                f"{VERSION}; use the release of latentwire-fast that wrote it, or a later one"
            )
        counts = range(1, _U16_MAX + 1)
        for name, value, allowed in (
            ("bits", self.bits, BITS),
            ("group size", self.group_size, (0,) if self.bits == 16 else ops.GROUP_SIZES),
            ("M (latents)", self.latents, counts),
            ("d_z", self.d_z, counts),
            ("fingerprint", self.fingerprint, range(_U16_MAX + 1)),
        ):
            if not isinstance(value, int) or value not in allowed:
                wanted = (
                    f"from {allowed[0]} to {allowed[-1]}" if len(allowed) > 4 else f"of {allowed}"
                )
                raise PayloadError(f"{name} is {value!r}; expected an integer {wanted}")

    @property
    def values(self) -> int:
        """Numbers in the latent."""
        return self.latents * self.d_z

    @property
    def groups(self) -> int:
        """Groups, hence scales; the last group may be short."""
        return -(-self.values // self.group_size) if self.group_size else 0

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes (at 16 bits: of the values)."""
        if self.bits == 16:
            return 2 * self.values
        return code_bytes(self.values, bits=self.bits, group_size=self.group_size)

    @property
    def body_bytes(self) -> int:
        """Bytes after the header."""
        return self.code_bytes + 2 * self.groups

    @property
    def payload_bytes(self) -> int:
        """The only length that a payload with this header can have."""
        return HEADER_BYTES + self.body_bytes


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
            Inf; at 16 bits, a value beyond fp16; bits, group size or fingerprint out of range.
    """
    _require_latent(latent_MD, dims="[M, d_z]")
    return _pack(latent_MD.unsqueeze(0), bits, group_size, fingerprint)[0]


def pack_batch(
    latent_BMD: Tensor, *, bits: int, group_size: int, fingerprint: int = 0
) -> list[bytes]:
    """One payload per latent, quantised together; otherwise like `pack`."""
    _require_latent(latent_BMD, dims="[B, M, d_z]")
    return _pack(latent_BMD, bits, group_size, fingerprint)


def _require_latent(latent: Tensor, *, dims: str) -> None:
    if not isinstance(latent, Tensor) or not latent.is_floating_point():
        kind = latent.dtype if isinstance(latent, Tensor) else type(latent).__name__
        raise PayloadError(f"a latent is a tensor of floats, got {kind}; convert it first")
    shape = list(latent.shape)
    if len(shape) != dims.count(",") + 1:
        raise PayloadError(f"expected a latent {dims}, got {shape}; reshape it or pick from it")
    _require_finite(latent.detach(), latent.detach(), "has training diverged?")


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
        return [_seal(header, body) for body in _rows(half_BMD)]
    codes_Bc, scales_BG = _quantize_twice(single_BMD, header)
    return [
        _seal(header, codes + scales)
        for codes, scales in zip(_rows(codes_Bc), _rows(scales_BG), strict=True)
    ]


def _quantize_twice(latent_BMD: Tensor, header: Header) -> tuple[Tensor, Tensor]:
    """Codes and scales that quantising what they stand for gives again.

    Once is not always enough: scales below fp16's normal range have few digits, and codes rounded
    with one can ask for the next smaller one. The second result is a fixed point, and the first
    for all groups with a value above 1e-3 (`docs/wire_format.md` has the proof).
    """
    codes_Bc, scales_BG = _quantize(latent_BMD, header)
    return _quantize(_dequantize(codes_Bc, scales_BG, header), header)


def _quantize(latent_BMD: Tensor, header: Header) -> tuple[Tensor, Tensor]:
    return ops.quantize_pack(latent_BMD, bits=header.bits, group_size=header.group_size)


def _dequantize(codes_Bc: Tensor, scales_BG: Tensor, header: Header) -> Tensor:
    return ops.unpack_dequantize(
        codes_Bc,
        scales_BG,
        bits=header.bits,
        group_size=header.group_size,
        shape=(len(codes_Bc), header.latents, header.d_z),
        dtype=torch.float32,
    )


def _rows(tensor: Tensor) -> list[bytes]:
    """The little-endian bytes of each row."""
    array = tensor.cpu().numpy()
    return [row.tobytes() for row in array.astype(array.dtype.newbyteorder("<"), copy=False)]


def _seal(header: Header, body: bytes) -> bytes:
    h = header
    fields = _FIELDS.pack(
        MAGIC, h.version, h.bits, h.latents, h.d_z, h.group_size, 0, h.fingerprint
    )
    return fields + _CRC.pack(_crc(fields, body)) + body


def _crc(fields: bytes, body: bytes | memoryview) -> int:
    """CRC-32 of the payload with the CRC's own field zero."""
    return zlib.crc32(body, zlib.crc32(fields + bytes(_CRC.size)))


# --- payload to latent ----------------------------------------------------------------------------


def read_header(payload: bytes) -> Header:
    """The header at the start of `payload`, which may be cut short or go on with other payloads.

    Checks every field, but neither the length nor the CRC: `unpack` does.

    Raises:
        PayloadError: under 16 bytes, another magic, an unknown version, a field out of range.
    """
    if not isinstance(payload, bytes):
        raise PayloadError(f"a payload is bytes, got {type(payload).__name__}; convert it first")
    if len(payload) < HEADER_BYTES:
        raise PayloadError(
            f"{len(payload)} bytes are fewer than the {HEADER_BYTES} of a payload's header; "
            "it was cut short: send it again"
        )
    magic, version, bits, latents, d_z, group_size, reserved, fingerprint = _FIELDS.unpack_from(
        payload
    )
    if magic != MAGIC:
        raise PayloadError(
            f"the first two bytes are {magic.hex(' ')}, a payload's are {MAGIC.hex(' ')}; "
            "this is something else: check where it comes from"
        )
    header = Header(
        version=version,
        bits=bits,
        latents=latents,
        d_z=d_z,
        group_size=group_size,
        fingerprint=fingerprint,
    )
    if reserved:
        raise PayloadError(
            f"the reserved byte is {reserved}, in version {VERSION} it is 0; send the payload again"
        )
    return header


def unpack(payload: bytes) -> tuple[Tensor, Header]:
    """The latent `[M, d_z]`, fp32 on the CPU, and the header of one payload.

    Raises:
        PayloadError: anything but the exact bytes that `pack` writes for some latent.
    """
    header = _check_frame(payload)
    return _decode([payload], header)[0], header


def unpack_batch(payloads: Sequence[bytes]) -> tuple[Tensor, list[Header]]:
    """Latents `[B, M, d_z]`, fp32 on the CPU, and headers of payloads of one layout.

    Raises:
        PayloadError: no payloads; one that `unpack` refuses (the message has its index); two that
            differ in M, d_z, bits or group size. Fingerprints may differ: the caller knows which
            one to expect.
    """
    headers = []
    for i, payload in enumerate(payloads):
        with _at(f"payload {i}"):
            headers.append(_check_frame(payload))
    if not headers:
        raise PayloadError("no payloads to unpack; give at least one")
    layouts = [(h.latents, h.d_z, h.bits, h.group_size) for h in headers]
    for i, layout in enumerate(layouts):
        if layout != layouts[0]:
            raise PayloadError(
                f"payload {i} has (M, d_z, bits, group size) {layout}, payload 0 has {layouts[0]}; "
                "unpack payloads of different layouts one by one"
            )
    return _decode(payloads, headers[0]), headers


def _check_frame(payload: bytes) -> Header:
    """Check header, total length and CRC; allocate nothing that grows with what they claim."""
    header = read_header(payload)
    if len(payload) != header.payload_bytes:
        raise PayloadError(
            f"{len(payload)} bytes, but a latent [{header.latents}, {header.d_z}] at {header.bits} "
            f"bits takes {header.payload_bytes}; it was cut short or joined with "
            "something: send it again"
        )
    (stated,) = _CRC.unpack_from(payload, _FIELDS.size)
    actual = _crc(payload[: _FIELDS.size], memoryview(payload)[HEADER_BYTES:])
    if stated != actual:
        raise PayloadError(
            f"the CRC-32 is {actual:#010x}, the header says {stated:#010x}; "
            "the bytes were changed on their way: send the payload again"
        )
    return header


@contextmanager
def _at(place: str) -> Iterator[None]:
    """Put the place before the message of a `PayloadError`."""
    try:
        yield
    except PayloadError as error:
        raise PayloadError(f"{place}: {error}") from None


def _decode(payloads: Sequence[bytes], header: Header) -> Tensor:
    """Latents `[B, M, d_z]` of payloads with this layout whose frames were checked."""
    bodies = bytearray().join(memoryview(payload)[HEADER_BYTES:] for payload in payloads)
    body_Bc = np.frombuffer(bodies, np.uint8).reshape(len(payloads), header.body_bytes)
    first = header.code_bytes if header.groups else 0
    words = body_Bc[:, first:].copy().view("<u2")  # copied, because it may start at an odd address
    fp16 = torch.from_numpy(words.view("<f2").astype(np.float16, copy=False))
    if header.bits == 16:
        unwritten = ((words & 0x7FFF) >= _FP16_INFINITY) | (words == _FP16_MINUS_ZERO)
        _refuse(unwritten, "value {} is NaN, infinite or -0.0")
        return fp16.view(-1, header.latents, header.d_z).float()
    _refuse(words >= _FP16_INFINITY, "the scale of group {} is NaN, infinite or has its sign set")
    codes_Bc = torch.from_numpy(body_Bc[:, :first])
    latent_BMD = _dequantize(codes_Bc, fp16, header)
    again_Bc, again_BG = _quantize(latent_BMD, header)
    _refuse((again_BG != fp16).numpy(), "the scale of group {} is not the one its codes ask for")
    _refuse((again_Bc != codes_Bc).numpy(), "code byte {} is out of range or has padding set")
    return latent_BMD


def _refuse(unwritten: np.ndarray, what: str) -> None:
    """Raise when anything is set in `unwritten` `[B, n]`, which marks what `pack` never writes."""
    if unwritten.any():
        row, column = np.argwhere(unwritten)[0].tolist()
        place = f"payload {row}: " if len(unwritten) > 1 else ""
        raise PayloadError(
            f"{place}{what.format(column)}, which no latent is packed to; the CRC is right, so it "
            "was sent like this: check what wrote it"
        )


# --- files ----------------------------------------------------------------------------------------


def write_payloads(path: Path, payloads: Iterable[bytes]) -> int:
    """Write payloads one after the other, nothing between them; returns the bytes of the file.

    After an error or a crash the file is what it was before.

    Raises:
        PayloadError: no payloads, or bytes that are not one (the message has their index).
        OSError: the file system refuses.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            for i, payload in enumerate(payloads):
                with _at(f"payload {i}"):
                    _check_frame(payload)
                file.write(payload)
            size = file.tell()
            if not size:
                raise PayloadError(f"no payloads to write to {path}; give at least one")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # makes the new name last
    finally:
        os.close(folder)
    return size


def read_payloads(path: Path) -> Iterator[bytes]:
    """The payloads of a file in order; their headers, lengths and CRCs are checked.

    A file that was cut exactly between two payloads cannot be told from a shorter one.

    Raises:
        PayloadError: no such file, an empty one, or something in it that is not a payload (the
            message has its index and its offset in bytes); what stood before it has been yielded.
    """
    try:
        file = path.open("rb")
    except (FileNotFoundError, IsADirectoryError) as error:
        raise PayloadError(f"{path}: {error.strerror}; give the path of a payload file") from None
    with file:
        size = os.fstat(file.fileno()).st_size
        if not size:
            raise PayloadError(f"{path}: is empty; a payload file holds at least one payload")
        index = offset = 0
        while offset < size:
            with _at(f"{path}: payload {index} at byte {offset}"):
                head = file.read(HEADER_BYTES)
                # Never more than the file holds, whatever the header claims.
                rest = min(read_header(head).body_bytes, size - offset - HEADER_BYTES)
                payload = head + file.read(rest)
                _check_frame(payload)
            yield payload
            index, offset = index + 1, offset + len(payload)


# --- the text that a payload replaces -------------------------------------------------------------


def utf8_bytes(text: str) -> int:
    """Bytes of the text as UTF-8."""
    return len(text.encode())


def brotli_bytes(text: str) -> int:
    """Bytes of the text compressed by itself: UTF-8 through Brotli at its best quality, 11."""
    return len(brotli.compress(text.encode(), quality=11))
