"""Cut a large file into parts that may travel, and put them together again.

    python bench/real/file_parts.py split model.gguf parts          # parts/model.gguf.00, .01 ...
    python bench/real/file_parts.py join parts/model.gguf.json .     # ./model.gguf

A list (NAME.json) holds the sha256 of the file and of each part. Nothing but Python is needed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

MEGABYTE = 10**6
PART_SIZE = 60 * MEGABYTE


class PartsError(Exception):
    """Parts that are missing, changed, or of no list."""


def split(file: Path, folder: Path, *, size: int = PART_SIZE) -> Path:
    """Write a file's parts of at most `size` bytes into a folder, and their list beside them.

    Returns:
        The path of the list.
    """
    folder.mkdir(parents=True, exist_ok=True)
    whole, parts = hashlib.sha256(), []
    for number, piece in enumerate(_pieces(file, size)):
        whole.update(piece)
        name = f"{file.name}.{number:02}"
        (folder / name).write_bytes(piece)
        parts.append({"name": name, "sha256": hashlib.sha256(piece).hexdigest()})
    listed = {"name": file.name, "sha256": whole.hexdigest(), "parts": parts}
    path = folder / f"{file.name}.json"
    path.write_text(json.dumps(listed, indent=2) + "\n")
    return path


def _pieces(file: Path, size: int) -> Iterator[bytes]:
    with file.open("rb") as stream:
        while piece := stream.read(size):
            yield piece


def join(listed: Path, folder: Path) -> Path:
    """Put a file together from the parts beside its list.

    Returns:
        The file's path, in `folder`. It is there only when it is what was split.

    Raises:
        PartsError: no such list, or a part that is missing or was changed.
    """
    try:
        entry = json.loads(listed.read_text())
        name, parts = Path(entry["name"]).name, [(p["name"], p["sha256"]) for p in entry["parts"]]
        expected = entry["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PartsError(f"{listed} is no list of parts ({error!r})") from None
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"{name}.unfinished"
    whole = hashlib.sha256()
    with unfinished.open("wb") as stream:
        for part, digest in parts:
            path = listed.parent / Path(part).name
            if not path.is_file():
                raise PartsError(f"{path} is missing; bring it here, then run this again")
            piece = path.read_bytes()
            if hashlib.sha256(piece).hexdigest() != digest:
                raise PartsError(f"{path} is not what was written; bring it here again")
            whole.update(piece)
            stream.write(piece)
    if whole.hexdigest() != expected:
        raise PartsError(f"{listed}: the parts are right, the whole is not; split the file again")
    return unfinished.replace(folder / name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0; 2 for parts that are not right."""
    parser = argparse.ArgumentParser(prog="file_parts", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    cut = commands.add_parser("split", help="cut FILE into parts in FOLDER")
    cut.add_argument("file", type=Path)
    cut.add_argument("folder", type=Path)
    cut.add_argument("--megabytes", type=int, default=PART_SIZE // MEGABYTE, help="of a part")
    put = commands.add_parser("join", help="put together the file of LIST, in FOLDER")
    put.add_argument("list", type=Path)
    put.add_argument("folder", type=Path)
    args = parser.parse_args(arguments)
    try:
        if args.command == "split":
            print(split(args.file, args.folder, size=max(1, args.megabytes) * MEGABYTE))
        else:
            print(join(args.list, args.folder))
    except (PartsError, OSError) as error:
        print(f"file_parts: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
