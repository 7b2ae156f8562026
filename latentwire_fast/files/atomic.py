"""Changes on disk that a crash cannot leave half done, and one writer per run folder."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor


class Disk:
    """Every change that a save makes on disk, one method each: tests fail at any of them."""

    def create(self, folder: Path) -> None:
        folder.mkdir(parents=True)

    def write_tensors(self, path: Path, tensors: dict[str, Tensor]) -> None:
        # safetensors makes files that only their owner may read; keep what the umask allows
        path.touch()
        mode = path.stat().st_mode
        save_file(tensors, path)
        path.chmod(mode)

    def write_bytes(self, path: Path, content: bytes) -> None:
        path.write_bytes(content)

    def sync(self, path: Path) -> None:
        """fsync a file or a folder."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        source.replace(target)

    def remove(self, folder: Path) -> None:
        shutil.rmtree(folder)


disk = Disk()


def check_replaceable(path: Path) -> None:
    """Raise unless a file may be renamed over `path`: a device (`/dev/null`) would be gone.

    Raises:
        OSError: something is there that is no file.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():
        raise FileExistsError(
            f"{path} is a device or a pipe, and no file takes its place; give a file"
        )


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a small file as a whole: after a crash it holds what it held, or the new content.

    Raises:
        OSError: the file system refuses, or something is there that is no file.
    """
    check_replaceable(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # a second writer has its own
    try:
        disk.write_bytes(temporary, content.encode() if isinstance(content, str) else content)
        disk.sync(temporary)
        disk.rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    disk.sync(path.parent)


def publish_folder(temporary: Path, final: Path) -> None:
    """Rename a folder into place once all in it is on disk: after a crash `final` is complete or
    absent."""
    for path in sorted(temporary.rglob("*")):
        disk.sync(path)
    disk.sync(temporary)
    disk.rename(temporary, final)
    disk.sync(final.parent)


def replace_folder(temporary: Path, final: Path) -> None:
    """`publish_folder` in the place of what may be there. A crash may leave neither: it is for what
    is written again then."""
    old = final.with_name(f".{final.name}.old")
    if old.exists():
        disk.remove(old)
    if final.exists():
        disk.rename(final, old)
    publish_folder(temporary, final)
    if old.exists():
        disk.remove(old)


def file_entry(path: Path) -> dict[str, Any]:
    """The entry of a file in a manifest: its length and sha256."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}
