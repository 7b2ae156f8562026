"""JSON files, read with one set of messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from latentwire_fast.errors import LatentWireError
from latentwire_fast.files.text import read_unpacked


def read_json(
    path: Path, *, error: type[LatentWireError], advice: str = "give the path of a JSON file"
) -> Any:
    """The value of a UTF-8 JSON file, which may be packed (.xz, .gz).

    Args:
        error: what is raised when there is no such file, or one that is not JSON.
        advice: what to do when there is none.
    """
    try:
        content = read_unpacked(path, error=error)
    except FileNotFoundError:
        raise error(f"{path}: no such file; {advice}") from None
    except IsADirectoryError:
        raise error(f"{path}: is a folder; {advice}") from None
    return parse_json(content, name=str(path), error=error)


def parse_json(content: bytes, *, name: str, error: type[LatentWireError]) -> Any:
    """The value of UTF-8 JSON.

    Args:
        name: of where it comes from, for messages.
        error: what is raised where it is not JSON.
    """
    try:
        return json.loads(content.decode("utf-8-sig"))  # Windows writes a mark first
    except UnicodeDecodeError as wrong:
        raise error(
            f"{name}: not UTF-8 text ({wrong.reason} at byte {wrong.start}); convert it first"
        ) from None
    except json.JSONDecodeError as wrong:
        raise error(
            f"{name}: not valid JSON at line {wrong.lineno}, column {wrong.colno} ({wrong.msg}); "
            "is the file complete?"
        ) from None
    except (ValueError, RecursionError) as wrong:  # numbers too long, nesting too deep
        raise error(f"{name}: cannot be read as JSON ({wrong})") from None
