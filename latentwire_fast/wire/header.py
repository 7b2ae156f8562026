"""What a payload says of itself; in version 1, 16 bytes before the body.

Version 2 has a smaller frame (`frame.py`): its model knows the rest of what a `Header` says.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from latentwire_fast import ops
from latentwire_fast.config.schema import BITS
from latentwire_fast.errors import PayloadError
from latentwire_fast.reference import code_bytes
from latentwire_fast.wire.frame import VERSION_2, is_frame

MAGIC = b"LW"
VERSION = 1
HEADER_BYTES = 16
# magic, version, bits, M, d_z, group size, reserved, fingerprint; then the CRC
_FIELDS, _CRC = struct.Struct("<2sBBHHBBH"), struct.Struct("<I")
_U16_MAX = 0xFFFF


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a payload is of: in version 1 the fields of its first 16 bytes, without the CRC. A
    header that exists is valid.

    Attributes:
        bits: bits per value: 16, 8, 6 or 4; in version 2 as its bottleneck counts them.
        latents: M, 1 to 65,535.
        d_z: latent width, 1 to 65,535.
        group_size: values per scale: 16, 32 or 64; 0 at 16 bits, which has no scales, and in
            version 2, whose sizes are not computed from it.
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
        if self.version not in (VERSION, VERSION_2):
            raise _unknown_version(self.version)
        counts, is_first = range(1, _U16_MAX + 1), self.version == VERSION
        has_groups = is_first and self.bits != 16
        for name, value, allowed in (
            ("bits", self.bits, BITS if is_first else counts),
            ("group size", self.group_size, ops.GROUP_SIZES if has_groups else (0,)),
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


def read_header(payload: bytes) -> Header:
    """The header of version 1 at the start of `payload`, which may be cut short or go on with other
    payloads.

    Checks every field, but neither the length nor the CRC: `unpack` does.

    Raises:
        PayloadError: under 16 bytes, another magic, an unknown version, a field out of range.
    """
    if not isinstance(payload, bytes):
        raise PayloadError(f"a payload is bytes, got {type(payload).__name__}; convert it first")
    if is_frame(payload):
        raise PayloadError(
            f"the first two bytes are {payload[:2].hex(' ')}, which begin a payload of version 2, "
            "and this reads version 1; decode it with the model that encoded it"
        )
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
    if version != VERSION:
        raise _unknown_version(version)
    header = Header(
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


def _unknown_version(version: int) -> PayloadError:
    return PayloadError(
        f"payload format version {version} is unknown, this release reads version {VERSION} here; "
        "use the release of latentwire-fast that wrote it, or a later one"
    )


def seal(header: Header, body: bytes) -> bytes:
    """The payload of a header and its body."""
    h = header
    fields = _FIELDS.pack(
        MAGIC, h.version, h.bits, h.latents, h.d_z, h.group_size, 0, h.fingerprint
    )
    return fields + _CRC.pack(_crc(fields, body)) + body


def _crc(fields: bytes, body: bytes | memoryview) -> int:
    """CRC-32 of the payload with the CRC's own field zero."""
    return zlib.crc32(body, zlib.crc32(fields + bytes(_CRC.size)))


def check_frame(payload: bytes) -> Header:
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
def located(place: str) -> Iterator[None]:
    """Put the place before the message of a `PayloadError`."""
    try:
        yield
    except PayloadError as error:
        raise PayloadError(f"{place}: {error}") from None
