"""One writer per run folder."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import TextIO

from latentwire_fast.errors import TrainingError
from latentwire_fast.files.run_folder import RunFolder


class RunLock:
    """One writer per run folder: `with RunLock(run_dir): ...`, released when the process ends.

    Raises:
        TrainingError: another process holds the folder (the message has its pid), or it cannot be
            locked.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = RunFolder(run_dir).lock
        self._file: TextIO | None = None

    def __enter__(self) -> RunLock:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = self.path.open("a+", encoding="utf-8")
        except OSError as error:
            raise TrainingError(
                f"cannot write to run folder {self.path.parent}: {error}; check its permissions, "
                "or choose another run folder"
            ) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        except BlockingIOError:
            with file:
                file.seek(0)
                holder = file.read() or "unknown"
            raise TrainingError(
                f"run folder {self.path.parent} is in use by process {holder}; wait for it, or "
                "choose another run folder"
            ) from None
        except OSError as error:
            file.close()
            raise TrainingError(f"cannot lock run folder {self.path.parent}: {error}") from error
        self._file = file
        return self

    def __exit__(self, *_: object) -> None:
        # The file stays: deleting it would let two later writers lock two different files.
        if self._file is not None:
            fcntl.flock(self._file, fcntl.LOCK_UN)
            self._file.close()
            self._file = None
