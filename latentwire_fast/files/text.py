"""Plain text files, packed (.xz, .gz) or not."""

from __future__ import annotations

import gzip
import lzma
import zlib
from pathlib import Path

from latentwire_fast.errors import DataError, LatentWireError

_UNPACK = {".xz": lzma.decompress, ".gz": gzip.decompress}


def read_unpacked(path: Path, *, error: type[LatentWireError] = DataError) -> bytes:
    """A file's bytes; those of a .xz or .gz file unpacked.

    Args:
        error: what is raised where it cannot be unpacked.

    Raises:
        OSError: it cannot be read.
    """
    return unpack(path.read_bytes(), path.name, name=str(path), error=error)


def unpack(data: bytes, file: str, *, name: str, error: type[LatentWireError] = DataError) -> bytes:
    """The bytes of a file of that name; those of a .xz or .gz file unpacked.

    Args:
        name: of where they come from, for messages.
        error: what is raised where they cannot be unpacked.
    """
    method = _UNPACK.get(Path(file).suffix.lower())
    if method is None:
        return data
    try:
        return method(data)
    except (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as wrong:
        raise error(
            f"{name}: cannot be unpacked ({wrong}); is the file complete, and is it what its "
            "name says?"
        ) from None


def read_text(path: Path) -> str:
    """A UTF-8 file's text, or a pipe's, without outer white space.

    Raises:
        DataError: missing, unreadable, not UTF-8, or empty.
    """
    try:
        content = read_unpacked(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    return decode_text(content, name=str(path))


def decode_text(content: bytes, *, name: str) -> str:
    """The text that bytes hold, without outer white space.

    Args:
        name: of where they come from, for messages.

    Raises:
        DataError: not UTF-8, or empty.
    """
    try:
        text = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n").strip()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name} is not UTF-8 text (byte {error.start}); convert it first"
        ) from None
    if not text:
        raise DataError(f"{name} holds no text")
    return text
