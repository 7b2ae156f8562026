"""Files of payloads, one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from latentwire_fast.errors import PayloadError
from latentwire_fast.files.atomic import write_atomically
from latentwire_fast.wire.header import HEADER_BYTES, check_frame, located, read_header

_PIECE = 1 << 16  # bytes


def write_payloads(path: Path, payloads: Iterable[bytes]) -> int:
    """Write payloads one after the other, nothing between them; returns the bytes of the file.

    After an error or a crash the file is what it was before.

    Raises:
        PayloadError: no payloads, or bytes that are not one (the message has their index).
        OSError: the file system refuses, or something is there that is no file.
    """
    content = bytearray()
    for i, payload in enumerate(payloads):
        with located(f"payload {i}"):
            check_frame(payload)
        content += payload
    if not content:
        raise PayloadError(f"no payloads to write to {path}; give at least one")
    write_atomically(path, bytes(content))
    return len(content)


def read_payloads(path: Path) -> Iterator[bytes]:
    """The payloads of a file or a pipe in order; their headers, lengths and CRCs are checked.

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
        yield from read_payload_stream(file, name=str(path))


def read_payload_stream(stream: BinaryIO, *, name: str) -> Iterator[bytes]:
    """The payloads of an open stream, such as standard input; otherwise like `read_payloads`.

    Args:
        name: what messages call it.
    """
    index = offset = 0
    while head := _read(stream, HEADER_BYTES):
        with located(f"{name}: payload {index} at byte {offset}"):
            payload = head + _read(stream, read_header(head).body_bytes)
            check_frame(payload)
        yield payload
        index, offset = index + 1, offset + len(payload)
    if not index:
        raise PayloadError(f"{name}: is empty; a payload file holds at least one payload")


def _read(stream: BinaryIO, size: int) -> bytes:
    """The next `size` bytes, or what is left of them. Memory grows with what is there, whatever a
    header claims."""
    content = bytearray()
    while len(content) < size:
        piece = stream.read(min(size - len(content), _PIECE))
        if not piece:
            break
        content += piece
    return bytes(content)
