"""Plain text files."""

from __future__ import annotations

from pathlib import Path

from latentwire_fast.errors import DataError


def read_text(path: Path) -> str:
    """A UTF-8 file's text, or a pipe's, without outer white space.

    Raises:
        DataError: missing, unreadable, not UTF-8, or empty.
    """
    try:
        content = path.read_bytes()
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
