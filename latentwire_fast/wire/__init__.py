"""Payloads: a latent as bytes, and back. `docs/wire_format.md` specifies the format.

    >>> payload = pack(latent_MD, bits=6, group_size=32)  # len(payload) is what the wire carries
    >>> latent_MD, header = unpack(payload)

A payload is a 16-byte header, packed codes, and one fp16 scale per group (at 16 bits: fp16 values
alone). It is canonical: `pack` turns what `unpack` accepts back into the same bytes, so payloads
are equal exactly when headers and latents are. Bytes from outside are checked in this order:
header, total length, CRC-32, values. Nothing that grows with what a header claims is allocated
before the bytes given are known to have that length.

That is version 1. A payload of version 2 is a frame of 7 bytes and a body that only its model can
read: bottlenecks write and read them (`models/bottlenecks/`), and files hold both.
"""

from latentwire_fast.config.schema import BITS
from latentwire_fast.wire.files import read_payload_stream, read_payloads, write_payloads
from latentwire_fast.wire.header import HEADER_BYTES, MAGIC, VERSION, Header, read_header
from latentwire_fast.wire.payload import pack, pack_batch, unpack, unpack_batch
from latentwire_fast.wire.sizes import brotli_bytes, payload_bytes, utf8_bytes

VERSIONS = (1, 2)  # that are read

__all__ = [
    "BITS",
    "HEADER_BYTES",
    "MAGIC",
    "VERSION",
    "VERSIONS",
    "Header",
    "brotli_bytes",
    "pack",
    "pack_batch",
    "payload_bytes",
    "read_header",
    "read_payload_stream",
    "read_payloads",
    "unpack",
    "unpack_batch",
    "utf8_bytes",
    "write_payloads",
]
