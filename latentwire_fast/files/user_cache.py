"""The folder of this user for what can be made again, such as converted models."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from latentwire_fast.errors import ConfigError

VARIABLE = "LATENTWIRE_CACHE"


def user_cache(name: str) -> Path:
    """A folder for one kind of things, in `$LATENTWIRE_CACHE`, or else `latentwire` among the
    user's caches (`$XDG_CACHE_HOME` or `~/.cache`); made if missing.

    Raises:
        ConfigError: it cannot be written to.
    """
    given = os.environ.get(VARIABLE)
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = (Path(given) if given else Path(caches) / "latentwire") / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise ConfigError(
            f"the cache folder {folder} cannot be written to; set {VARIABLE} to a folder that can"
        )
    return folder


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Processes that make the same thing in the cache do it one after the other; the lock is a file
    beside it, and is free again when its process ends."""
    with path.with_name(f".{path.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
