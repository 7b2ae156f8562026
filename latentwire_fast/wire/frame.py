"""The frame of a payload of version 2: 7 bytes before a body that only its model can read.

The model, named by the fingerprint, says what the body's symbols are, so the frame does not repeat
M, d_z or the bits. What a payload has otherwise than its model says follows the frame, flagged.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from latentwire_fast.errors import PayloadError

VERSION_2 = 2
FRAME_BYTES = 7
_MARK = 0xA0  # the high half of byte 0; version 1 begins with 0x4c
_HAS_LATENTS, _HAS_BITS = 1, 2
_HEAD, _CRC = struct.Struct("<BH"), struct.Struct("<I")
_CRC_AT = _HEAD.size
_VARINT_MOST = 0xFFFF_FFFF


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The parts of a payload of version 2.

    Attributes:
        fingerprint: 16 bits that name the model.
        body: the symbols, coded.
        latents: M, where it is not the model's.
        bits: where they are not the model's.
    """

    fingerprint: int
    body: bytes
    latents: int | None = None
    bits: int | None = None


def is_frame(payload: bytes) -> bool:
    """Whether bytes begin like a payload of version 2."""
    return payload[:1] != b"" and payload[0] & 0xF0 == _MARK


def seal_frame(frame: Frame) -> bytes:
    """The payload of a frame."""
    flags = (frame.latents is not None) * _HAS_LATENTS | (frame.bits is not None) * _HAS_BITS
    extra = b"".join(varint(value) for value in (frame.latents, frame.bits) if value is not None)
    head, rest = _HEAD.pack(_MARK | flags, frame.fingerprint), extra + frame.body
    return head + _CRC.pack(_crc(head, rest)) + rest


def read_frame(payload: bytes) -> Frame:
    """The parts of a payload of version 2 whose CRC is right.

    Raises:
        PayloadError: too short, no frame, an unknown flag, another CRC, or a number that is not
            written in the fewest bytes.
    """
    if not isinstance(payload, bytes):
        raise PayloadError(f"a payload is bytes, got {type(payload).__name__}; convert it first")
    if len(payload) < FRAME_BYTES:
        raise PayloadError(
            f"{len(payload)} bytes are fewer than the {FRAME_BYTES} before a payload's body in "
            "version 2; it was cut short: send it again"
        )
    first, fingerprint = _HEAD.unpack_from(payload)
    flags = first & 0x0F
    if first & 0xF0 != _MARK:
        raise PayloadError(
            f"the first byte is {first:#04x}, in a payload of version 2 it is 0xa0 to 0xa3; this "
            "is something else: check where it comes from"
        )
    if flags & ~(_HAS_LATENTS | _HAS_BITS):
        raise PayloadError(
            f"the flags of a payload of version 2 are {flags:#x}, this release knows 0 to 3; use "
            "the release of latentwire-fast that wrote it, or a later one"
        )
    (stated,), rest = _CRC.unpack_from(payload, _CRC_AT), payload[FRAME_BYTES:]
    actual = _crc(payload[:_CRC_AT], rest)
    if stated != actual:
        raise PayloadError(
            f"the CRC-32 is {actual:#010x}, the frame says {stated:#010x}; "
            "the bytes were changed or cut on their way, or others follow, such as another payload "
            "of version 2 without a stream: send the payload again, alone"
        )
    at, latents, bits = 0, None, None
    if flags & _HAS_LATENTS:
        latents, at = read_varint(rest, at)
    if flags & _HAS_BITS:
        bits, at = read_varint(rest, at)
    return Frame(fingerprint=fingerprint, body=rest[at:], latents=latents, bits=bits)


def _crc(head: bytes, rest: bytes) -> int:
    """CRC-32 of the payload with the CRC's own field zero."""
    return zlib.crc32(rest, zlib.crc32(head + bytes(_CRC.size)))


def varint(value: int) -> bytes:
    """A whole number from 0 in as few bytes as it needs: 7 bits in each, the lowest first; all
    bytes but the last have their highest bit set."""
    content = bytearray()
    while value > 0x7F:
        content.append(value & 0x7F | 0x80)
        value >>= 7
    content.append(value)
    return bytes(content)


def read_varint(content: bytes, at: int) -> tuple[int, int]:
    """The number that stands at a place, and the place behind it.

    Raises:
        PayloadError: it is cut short, beyond 32 bits, or written in more bytes than it needs.
    """
    value = shift = 0
    while at < len(content):
        byte = content[at]
        at, value, shift = at + 1, value | (byte & 0x7F) << shift, shift + 7
        if byte < 0x80:
            if (byte == 0 and shift > 7) or value > _VARINT_MOST:
                break
            return value, at
        if shift >= 35:
            break
    raise PayloadError(
        "a number is cut short, too large, or written in more bytes than it needs; send the "
        "payload again"
    )
