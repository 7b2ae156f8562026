"""Texts and folders that are old or new, never torn (C5), and one writer per run folder (C6).

The short ids are those of docs/guarantees.md.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from crashes import STEPS, Disk, InScript, failing
from latentwire_fast.errors import TrainingError
from latentwire_fast.files import atomic
from latentwire_fast.files.atomic import write_atomically
from latentwire_fast.files.lock import RunLock


def test_disk_steps_are_all_known() -> None:
    assert {name for name in vars(atomic.Disk) if name[0] != "_"} == set(STEPS)


@pytest.mark.parametrize("step", ["write_bytes", "sync", "rename"])
def test_a_failing_text_write_leaves_the_old_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "report.json"
    write_atomically(path, "old")
    monkeypatch.setattr(atomic, "disk", Disk(failing(step, errno.EIO)))
    with pytest.raises(OSError, match="simulated"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_of_one_file_do_not_meet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has a temporary file of its own, and the last to rename wins."""
    path = tmp_path / "report.json"

    def interrupted(name: str, place: Path, do: Callable[[], None]) -> None:
        if name == "rename":
            with monkeypatch.context() as other:
                other.setattr(atomic, "disk", atomic.Disk())
                other.setattr(os, "getpid", lambda: 1)
                write_atomically(path, b"theirs")
        do()

    monkeypatch.setattr(atomic, "disk", Disk(interrupted))
    write_atomically(path, "ours")
    assert path.read_text() == "ours"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", [".", "/", "folder"])
def test_a_folder_is_no_file_to_replace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(IsADirectoryError, match=f"Is a directory: '{name}'"):
        write_atomically(Path(name), "text")
    assert [*tmp_path.iterdir()] == [tmp_path / "folder"]


def test_what_is_no_regular_file_is_not_replaced(tmp_path: Path) -> None:
    """A pipe stands for `/dev/null`, which a rename by root would take away."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(FileExistsError, match="is a device or a pipe"):
        write_atomically(pipe, "text")
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]


# --- C6: two writers ----------------------------------------------------------------------------


def test_the_second_writer_refuses(tmp_path: Path) -> None:
    with RunLock(tmp_path / "run"):
        with (
            pytest.raises(TrainingError, match=f"in use by process {os.getpid()}"),
            RunLock(tmp_path / "run"),
        ):
            pytest.fail("two writers")
        with RunLock(tmp_path / "other"):
            pass
    with RunLock(tmp_path / "run"):
        pass


def case_lock(root: Path) -> dict:
    """C6 across processes: refused while another process lives, free once it was killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with RunLock(root):
            os.write(writing, b"held")
            time.sleep(300)
    os.read(reading, 4)
    try:
        with RunLock(root):
            refusal = ""
    except TrainingError as error:
        refusal = str(error)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with RunLock(root):
        return {"child": child, "refusal": refusal}


def test_across_processes(in_script: InScript, tmp_path: Path) -> None:
    result = in_script(case_lock, tmp_path)
    assert f"in use by process {result['child']}" in result["refusal"]


def test_a_run_folder_that_cannot_be_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(TrainingError, match="cannot write to run folder"),
        RunLock(tmp_path / "file"),
    ):
        pass
