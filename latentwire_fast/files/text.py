"""Plain text files."""

from __future__ import annotations

from pathlib import Path

from latentwire_fast.errors import DataError


def read_text(path: Path) -> str:
    """A UTF-8 file's text without outer white space.

    Raises:
        DataError: missing, unreadable, not UTF-8, or empty.
    """
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text (byte {error.start}); convert it first"
        ) from None
    if not text:
        raise DataError(f"{path} holds no text")
    return text
