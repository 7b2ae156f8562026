"""Files and streams of payloads, one after the other.

A payload of version 1 says how long it is. Those of version 2 stand in a stream: what they have in
common once, then each with its length, then an end mark (`docs/wire_format.md`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from latentwire_fast.errors import PayloadError
from latentwire_fast.files.atomic import write_atomically
from latentwire_fast.wire.frame import FRAME_BYTES, is_frame, read_frame, read_varint, varint
from latentwire_fast.wire.header import HEADER_BYTES, MAGIC, check_frame, located, read_header

_PIECE = 1 << 16  # bytes
STREAM = MAGIC + b"\x02"  # begins a stream of payloads of version 2
_SHARED = 3  # bytes that they have in common: flags and fingerprint
_END = b"\0"  # in the place of a length: nothing of the stream follows


def write_payloads(path: Path, payloads: Iterable[bytes]) -> int:
    """Write payloads one after the other, nothing between them; returns the bytes of the file.

    Several payloads of version 2 make a stream; a single one is written as it is. After an error or
    a crash the file is what it was before.

    Raises:
        PayloadError: no payloads, or bytes that are not one (the message has their index).
        OSError: the file system refuses, or something is there that is no file.
    """
    payloads = list(payloads)
    for i, payload in enumerate(payloads):
        with located(f"payload {i}"):
            if is_frame(payload):
                read_frame(payload)
            else:
                check_frame(payload)
    if not payloads:
        raise PayloadError(f"no payloads to write to {path}; give at least one")
    content = payloads[0] if len(payloads) == 1 else joined(payloads)
    write_atomically(path, content)
    return len(content)


def joined(payloads: Iterable[bytes]) -> bytes:
    """Payloads as the bytes of a file; neighbours of version 2 that have their first bytes in
    common share these in one stream."""
    content, shared = bytearray(), b""  # shared: of the stream that is open
    for payload in payloads:
        head = payload[:_SHARED] if is_frame(payload) else b""
        if shared and head != shared:
            content += _END
        if head and head != shared:
            content += STREAM + head
        rest = payload[len(head) :]
        content += varint(len(rest)) + rest if head else payload
        shared = head
    return bytes(content + _END if shared else content)


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
    source, index = _Source(stream), 0
    while source.peek(1):
        for payload in _next_payloads(source, lambda i: f"{name}: payload {i}", index):
            yield payload
            index += 1
    if not index:
        raise PayloadError(f"{name}: is empty; a payload file holds at least one payload")


def _next_payloads(source: _Source, place: Callable[[int], str], index: int) -> Iterator[bytes]:
    """The next payload: one of version 1, one of version 2 that reaches to the end, or all of a
    stream."""
    with located(f"{place(index)} at byte {source.offset}"):
        if is_frame(source.peek(1)):
            payload = source.read_all()
            read_frame(payload)
        elif source.peek(len(STREAM)) == STREAM:
            payload = b""
        else:
            head = source.peek(HEADER_BYTES)
            payload = source.read(HEADER_BYTES + read_header(head).body_bytes)
            check_frame(payload)
    if payload:
        yield payload
        return
    shared = source.read(len(STREAM) + _SHARED)[len(STREAM) :]
    while True:
        with located(f"{place(index)} at byte {source.offset}"):
            size = _length(source)
            if size is None:
                return
            payload = shared + source.read(size)
            if len(payload) != _SHARED + size:
                raise PayloadError(
                    f"{size} bytes should follow, {len(payload) - _SHARED} do; the stream was cut "
                    "short: send it again"
                )
            read_frame(payload)
        yield payload
        index += 1


def _length(source: _Source) -> int | None:
    """How many bytes of the next payload follow in a stream; None at its end mark.

    Raises:
        PayloadError: there is no end mark, or no payload is so short.
    """
    content = b""
    while not content or content[-1] >= 0x80:
        byte = source.read(1)
        if not byte:
            raise PayloadError(
                "the stream ends without its end mark (a byte of 0 in the place of a length); it "
                "was cut short: send it again"
            )
        content += byte
        if len(content) > 5:
            break
    if content == _END:
        return None
    size, _ = read_varint(content, 0)
    if size < FRAME_BYTES - _SHARED:
        raise PayloadError(f"the length {size} is less than any payload's; send the stream again")
    return size


class _Source:
    """An open stream that can be looked ahead into. Memory grows with what is there, whatever a
    header claims.

    Attributes:
        offset: bytes that were read.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._ahead = bytearray()
        self.offset = 0

    def peek(self, size: int) -> bytes:
        """The next `size` bytes, or what is left of them."""
        while len(self._ahead) < size:
            piece = self._stream.read(min(size - len(self._ahead), _PIECE))
            if not piece:
                break
            self._ahead += piece
        return bytes(self._ahead[:size])

    def read(self, size: int) -> bytes:
        """As `peek`, and go on behind them."""
        content = self.peek(size)
        del self._ahead[: len(content)]
        self.offset += len(content)
        return content

    def read_all(self) -> bytes:
        """All that is left."""
        content = bytearray()
        while piece := self.read(_PIECE):
            content += piece
        return bytes(content)
