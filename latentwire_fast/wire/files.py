"""Files of payloads, one after the other."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from latentwire_fast.errors import PayloadError
from latentwire_fast.files.atomic import write_atomically
from latentwire_fast.wire.header import HEADER_BYTES, check_frame, located, read_header


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
            with located(f"{path}: payload {index} at byte {offset}"):
                head = file.read(HEADER_BYTES)
                # Never more than the file holds, whatever the header claims.
                rest = min(read_header(head).body_bytes, size - offset - HEADER_BYTES)
                payload = head + file.read(rest)
                check_frame(payload)
            yield payload
            index, offset = index + 1, offset + len(payload)
