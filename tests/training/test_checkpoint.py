"""Checkpoints survive crashes, damage and full disks, and restore every bit.

The short ids are those of docs/guarantees.md.
"""

from __future__ import annotations

import errno
import os
import pickle
import random
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from crashes import CRASHED, STEPS, Disk, InScript, failing, in_child
from latentwire_fast.errors import CheckpointError, TrainingError
from latentwire_fast.files import atomic
from latentwire_fast.files.atomic import file_entry
from latentwire_fast.files.lock import RunLock
from latentwire_fast.files.tensors import parameter_digest, read_tensors
from latentwire_fast.training import checkpoint
from latentwire_fast.training.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    verify_checkpoint,
)


def save(folder: Path, step: int, *, keep: int = 2, mark: int | None = None) -> Path:
    """A small checkpoint whose every value says which save wrote it."""
    mark = step if mark is None else mark
    tensors = {
        "model": {"weight": torch.full((3, 4), float(mark)), "bias": torch.full((4,), mark)},
        "optimizer": {"0/weight/exp_avg": torch.full((3, 4), float(mark), dtype=torch.bfloat16)},
    }
    return save_checkpoint(folder, step=step, tensors=tensors, state={"mark": mark}, keep=keep)


def load_mark(path: Path) -> tuple[int, int]:
    """(step, mark) of what loads, after checking that all of it comes from one save."""
    loaded = load_checkpoint(path)
    mark = loaded.state["mark"]
    values = [tensor for part in loaded.tensors.values() for tensor in part.values()]
    assert len(values) == 3
    assert all(bool((tensor == mark).all()) for tensor in values)
    return loaded.step, mark


# --- saving and loading -------------------------------------------------------------------------


def test_saved_is_loaded(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    tensors = {
        "a": {
            "scalar": torch.tensor(3),
            "empty": torch.empty(0, 4),
            "strided": shared.view(2, 3).T,
        },
        "tied.0": {"one": shared, "two": shared, "half": torch.tensor([1.5], dtype=torch.float16)},
        "none": {},
    }
    state = {"step": 7, "rate": 0.1 + 0.2, "list": [1, None, True], "text": "é"}
    path = save_checkpoint(tmp_path / "new" / "checkpoints", step=7, tensors=tensors, state=state)
    loaded = load_checkpoint(path)
    assert path.name == "step-00000007"
    assert (loaded.step, loaded.path, loaded.state) == (7, path, state)
    assert {name: set(part) for name, part in loaded.tensors.items()} == {
        name: set(part) for name, part in tensors.items()
    }
    for name, part in tensors.items():
        for key, tensor in part.items():
            torch.testing.assert_close(loaded.tensors[name][key], tensor, rtol=0, atol=0)
    assert load_checkpoint(path.parent).step == 7


def test_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]
    save(tmp_path, 5, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005"]


def test_an_existing_step_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 1, mark=10)
    assert load_mark(path) == (1, 10)
    assert list(tmp_path.iterdir()) == [path]


def test_a_save_at_an_earlier_step_leaves_the_abandoned_course(tmp_path: Path) -> None:
    for step in (10, 20):
        save(tmp_path, step)
    save(tmp_path, 15)
    assert load_mark(tmp_path) == (15, 15)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010", "step-00000015"]


def test_nothing_to_load(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "missing") is None
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        load_checkpoint(tmp_path / "missing")
    with pytest.raises(CheckpointError, match="step-00000003 is not a complete checkpoint"):
        load_checkpoint(tmp_path / "step-00000003")
    with pytest.raises(CheckpointError, match="is not named like a checkpoint"):
        verify_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": -1}, "step=-1"),
        ({"keep": 0}, "keep=0"),
        ({"tensors": {"../a": {}}}, "cannot name a tensor file"),
        ({"tensors": {".a": {}}}, "cannot name a tensor file"),
        ({"state": {"x": torch.zeros(1)}}, "is not JSON"),
    ],
)
def test_bad_arguments_write_nothing(tmp_path: Path, change: dict, message: str) -> None:
    arguments = {"step": 1, "tensors": {"a": {}}, "state": {}, **change}
    with pytest.raises(CheckpointError, match=message):
        save_checkpoint(tmp_path, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_files_are_readable_as_the_umask_says(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    assert {file.stat().st_mode for file in path.iterdir()} == {
        (path / "state.json").stat().st_mode
    }


# --- C1, C2: ends of the process ----------------------------------------------------------------


def crashing(at: int, when: str, log: Path) -> Callable[[str, Path, Callable[[], None]], None]:
    """Ends the process in the middle of disk step number `at`, or after it."""
    count = 0

    def around(name: str, path: Path, do: Callable[[], None]) -> None:
        nonlocal count
        count += 1
        if count != at:
            do()
            return
        log.write_text(f"{name} {when}")
        if when == "torn" and name.startswith("write"):
            do()
            os.truncate(path, path.stat().st_size // 2)
        elif when == "torn" and name == "remove":
            sorted(path.iterdir())[0].unlink()
        elif when == "after":
            do()
        os._exit(CRASHED)

    return around


def test_what_is_renamed_is_on_disk_and_nothing_is_deleted_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No test can cut the power; the order of the steps is what holds then."""
    save(tmp_path, 1)
    steps: list[tuple[str, str]] = []

    def around(name: str, path: Path, do: Callable[[], None]) -> None:
        steps.append((name, path.name))
        do()

    monkeypatch.setattr(atomic, "disk", Disk(around))
    save(tmp_path, 2, keep=1)
    assert steps == [
        ("create", ".step-00000002.tmp"),
        ("write_tensors", "model.safetensors"),
        ("sync", "model.safetensors"),
        ("write_tensors", "optimizer.safetensors"),
        ("sync", "optimizer.safetensors"),
        ("write_bytes", "state.json"),
        ("sync", "state.json"),
        ("write_bytes", "manifest.json"),
        ("sync", "manifest.json"),
        ("sync", ".step-00000002.tmp"),
        ("rename", ".step-00000002.tmp"),
        ("sync", tmp_path.name),
        ("rename", "step-00000001"),
        ("remove", ".step-00000001.old"),
    ]


def case_crash(root: Path) -> dict:
    """C1: for every disk step, crash there, then load, save again and load that."""
    scenarios = {  # what exists, what is being saved, what may load afterwards
        "first": ([], (1, 1, 2), [None, (1, 1)]),
        "next": ([(1, 1)], (2, 2, 1), [(1, 1), (2, 2)]),
        "replace": ([(1, 1)], (1, 10, 2), [(1, 1), (1, 10)]),
        "retire two": ([(1, 1), (2, 2)], (3, 3, 1), [(2, 2), (3, 3)]),
    }
    os.fsync = lambda _: None  # the end of a process loses nothing that the kernel already has
    cases, seen, log = 0, set(), root.with_name("log")
    for number, (existing, (step, mark, keep), allowed) in enumerate(scenarios.values()):
        folder, before = root / "checkpoints", root.with_name(f"before-{number}")
        for old_step, old_mark in existing:
            save(before, old_step, mark=old_mark)
        for when in ("torn", "after"):  # before a step is after the one before it
            for at in range(1, 1000):
                shutil.rmtree(root)
                if existing:
                    shutil.copytree(before, folder)

                def act(folder=folder, at=at, when=when, step=step, mark=mark, keep=keep) -> None:
                    atomic.disk = Disk(crashing(at, when, log))
                    save(folder, step, mark=mark, keep=keep)

                status = in_child(act)
                if status == 0:  # the save has fewer steps than `at`
                    break
                assert status == CRASHED
                cases += 1
                seen.add(log.read_text())
                found = load_mark(folder) if latest_checkpoint(folder) else None
                assert found in allowed, (when, at, found)
                save(folder, step, mark=mark + 1, keep=keep)
                assert load_mark(folder) == (step, mark + 1)
                assert not list(folder.glob(".*")), "leftovers of the crash"
    return {"cases": cases, "seen": sorted(seen)}


@pytest.fixture
def memory_path(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where the system has one: deleting hundreds of files on a disk takes
    longer than everything else in C1, and the end of a process loses nothing of either."""
    shared = Path("/dev/shm")
    is_writable = shared.is_dir() and os.access(shared, os.W_OK)
    with tempfile.TemporaryDirectory(dir=shared if is_writable else tmp_path) as folder:
        yield Path(folder)


def test_crash_at_every_disk_step(in_script: InScript, memory_path: Path) -> None:
    (memory_path / "root").mkdir()
    result = in_script(case_crash, memory_path / "root")
    assert set(result["seen"]) == {f"{s} {when}" for s in STEPS for when in ("torn", "after")}
    assert result["cases"] > 100


def case_kill(root: Path) -> dict:
    """C2: SIGKILL a process that saves without pause; whatever it had reported saved must load."""
    rng = random.Random(0)
    begun = time.monotonic()
    save(root, 1)
    duration = time.monotonic() - begun
    rounds, step, in_save = 20, 1, 0
    for _ in range(rounds):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            for now in range(step + 1, 10**6):
                os.write(writing, f"begin {now}\n".encode())
                save(root, now)
                os.write(writing, f"saved {now}\n".encode())
        os.close(writing)
        with os.fdopen(reading) as reports:
            lines = [reports.readline() for _ in range(rng.randrange(1, 6))]
            time.sleep(rng.uniform(0, duration))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            lines += reports.readlines()
        in_save += lines[-1].startswith("begin")
        reported = max([step, *(int(line[6:]) for line in lines if line.startswith("saved"))])
        found = load_mark(root)
        assert found in ((reported, reported), (reported + 1, reported + 1)), (found, lines)
        step = found[0]
    return {"rounds": rounds, "in_save": in_save, "last": step}


def test_sigkill_at_random_instants_loses_nothing(in_script: InScript, tmp_path: Path) -> None:
    result = in_script(case_kill, tmp_path)
    assert result["rounds"] == 20
    assert result["in_save"] >= 5, "too few kills fell into a save"
    assert result["last"] > 20, "too few saves to speak of"


# --- C4: damage ---------------------------------------------------------------------------------


FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


@pytest.mark.parametrize("name", FILES)
def test_every_truncation_and_flipped_byte_is_detected(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, 1)
    rng = random.Random(0)
    intact = (path / name).read_bytes()
    damaged = [intact[:length] for length in range(len(intact))]
    damaged += [intact + b"\0", intact + b"\n"]
    for position in range(len(intact)):
        changed = bytearray(intact)
        changed[position] ^= rng.randrange(1, 256)
        damaged.append(bytes(changed))
    for content in damaged:
        (path / name).write_bytes(content)
        with pytest.raises(CheckpointError):
            verify_checkpoint(path)
    (path / name).write_bytes(intact)
    verify_checkpoint(path)


@pytest.mark.parametrize("name", FILES)
def test_latest_falls_back_with_a_warning(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    content = bytearray((path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (path / name).write_bytes(content)
    assert load_mark(tmp_path) == (1, 1)
    assert "passing over a damaged checkpoint" in caplog.text
    assert "step-00000002" in caplog.text
    with pytest.raises(CheckpointError, match="step-00000002"):
        load_checkpoint(path)


@pytest.mark.parametrize("change", ["missing", "superfluous", "renamed"])
def test_the_set_of_files_is_checked(tmp_path: Path, change: str) -> None:
    path = save(tmp_path, 1)
    if change == "missing":
        (path / "model.safetensors").unlink()
    elif change == "superfluous":
        (path / "extra.safetensors").write_bytes(b"")
    else:
        path = path.rename(tmp_path / "step-00000009")
    with pytest.raises(CheckpointError):
        verify_checkpoint(path)


def test_all_damaged_is_an_error(tmp_path: Path) -> None:
    for step in (1, 2):
        (save(tmp_path, step) / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"all 2 checkpoints in .* are damaged"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "{}",
        '{"format": 2, "files": []}',
        '{"format": 3, "files": {}}',
        "[" * 10**5,
    ],
)
def test_strange_manifests(tmp_path: Path, text: str) -> None:
    path = save(tmp_path, 1)
    (path / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError):
        load_checkpoint(path)


def test_an_overlong_manifest_is_not_read(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    with (path / "manifest.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match="too long"):
        load_checkpoint(path)


# --- C5: a disk that refuses --------------------------------------------------------------------


@pytest.mark.parametrize("existing", [1, 2], ids=["next", "replace"])
@pytest.mark.parametrize(
    ("step", "code", "nth"),
    [
        ("create", errno.EROFS, 1),
        ("create", errno.EACCES, 1),
        ("write_tensors", errno.ENOSPC, 1),
        ("write_tensors", errno.ENOSPC, 2),
        ("write_bytes", errno.ENOSPC, 1),
        ("write_bytes", errno.ENOSPC, 2),
        ("sync", errno.EIO, 1),
        ("sync", errno.ENOSPC, 5),
        ("rename", errno.EACCES, 1),
    ],
)
def test_a_refusing_disk_raises_and_leaves_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, code: int, nth: int, existing: int
) -> None:
    old = save(tmp_path, existing)
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "disk", Disk(failing(step, code, nth=nth)))
        with pytest.raises(CheckpointError, match=r"could not save step 2 .*simulated"):
            save(tmp_path, 2, mark=20)
    assert list(tmp_path.iterdir()) == [old]
    assert load_mark(old) == (existing, existing)
    assert load_mark(save(tmp_path, 2, mark=20)) == (2, 20)


def test_failing_second_rename_of_a_replacement_puts_the_old_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path, 1)
    monkeypatch.setattr(atomic, "disk", Disk(failing("rename", errno.EIO, nth=2)))
    with pytest.raises(CheckpointError, match="simulated"):
        save(tmp_path, 1, mark=10)
    assert list(tmp_path.iterdir()) == [path]
    assert load_mark(path) == (1, 1)


@pytest.mark.parametrize("existing", [1, 2], ids=["next", "replace"])
def test_a_failing_last_sync_raises_and_something_complete_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: int
) -> None:
    """The new checkpoint is in place, but nobody may rely on it: the caller learns, both load."""
    save(tmp_path, existing)
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "disk", Disk(failing("sync", errno.EIO, nth=6)))
        with pytest.raises(CheckpointError, match="simulated"):
            save(tmp_path, 2, mark=20)
    assert load_mark(tmp_path) == (2, 20)
    old = "step-00000001" if existing == 1 else ".step-00000002.old"
    assert load_mark(tmp_path / old) == (existing, existing)


def test_an_undeletable_old_checkpoint_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "disk", Disk(failing("remove", errno.EACCES)))
        save(tmp_path, 2, keep=1)
    assert "could not delete the retired checkpoint" in caplog.text
    assert load_mark(tmp_path) == (2, 2)
    save(tmp_path, 3, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def case_limit(root: Path) -> dict:
    """C5 without simulation: the kernel refuses to let a file grow."""
    save(root, 1)

    def act() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        try:
            save_checkpoint(root, step=2, tensors={"a": {"b": torch.zeros(10_000)}}, state={})
        except CheckpointError as error:
            os._exit(CRASHED if "File too large" in str(error) else 1)

    status = in_child(act)
    return {"status": status, "loads": load_mark(root), "files": [p.name for p in root.iterdir()]}


def test_a_real_limit_of_the_kernel(in_script: InScript, tmp_path: Path) -> None:
    result = in_script(case_limit, tmp_path)
    assert result == {"status": CRASHED, "loads": [1, 1], "files": ["step-00000001"]}


def case_read_only(root: Path) -> dict:
    """C5 without simulation: an unprivileged process saves into a folder that it may only read."""
    save(root, 1)
    root.chmod(0o555)
    os.chdir(root)  # the folders above may be closed to other users

    def act() -> None:
        if os.geteuid() == 0:
            os.setuid(65534)
        refusals = 0
        try:
            save(Path(), 2)
        except CheckpointError as error:
            refusals += "Permission denied" in str(error)
        try:
            RunLock(Path()).__enter__()
        except TrainingError as error:
            refusals += "Permission denied" in str(error)
        os._exit(CRASHED if refusals == 2 else 1)

    status = in_child(act)
    return {"status": status, "loads": load_mark(root), "files": [p.name for p in root.iterdir()]}


def test_a_real_read_only_folder(in_script: InScript, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    result = in_script(case_read_only, folder)
    folder.chmod(0o755)
    assert result == {"status": CRASHED, "loads": [1, 1], "files": ["step-00000001"]}


# --- S2: hostile files --------------------------------------------------------------------------


class Bomb:
    """Unpickling creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_a_disguised_pickle_is_rejected_and_not_run(tmp_path: Path, how: str) -> None:
    effect = tmp_path / "effect"
    path = save(tmp_path, 1)
    model = path / "model.safetensors"
    if how == "pickle":
        model.write_bytes(pickle.dumps(Bomb(effect)))
    else:
        torch.save({"weight": Bomb(effect)}, model)
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        read_tensors(model)
    files = {name: file_entry(path / name) for name in FILES[:3]}
    (path / "manifest.json").write_text(checkpoint._manifest_text(1, files))
    verify_checkpoint(path)  # an attacker writes a manifest that fits
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load_checkpoint(path)
    assert not effect.exists()
    pickle.loads(pickle.dumps(Bomb(effect)))
    assert effect.exists(), "the bomb does not work, so the test shows nothing"


# --- digests ------------------------------------------------------------------------------------


def test_digest_depends_on_names_dtypes_shapes_and_bytes() -> None:
    base = {"a": torch.arange(6.0), "b": torch.tensor(1.0)}
    variants: list[dict[str, Tensor]] = [
        base,
        {"c": base["a"], "b": base["b"]},
        {"a": base["b"], "b": base["a"]},
        {"a": base["a"].view(2, 3), "b": base["b"]},
        {"a": base["a"].view(torch.int32), "b": base["b"]},
        {"a": base["a"].nextafter(torch.tensor(9.0)), "b": base["b"]},
        {"a": base["a"]},
        {},
    ]
    digests = [parameter_digest(variant.items()) for variant in variants]
    assert len(set(digests)) == len(variants)
    assert parameter_digest(reversed(base.items())) == digests[0]
    strided = torch.arange(6.0).view(2, 3).T.contiguous().T.flatten()
    assert parameter_digest({"b": base["b"], "a": strided}.items()) == digests[0]


def test_digest_takes_every_dtype() -> None:
    for dtype in (torch.bool, torch.uint8, torch.float16, torch.bfloat16, torch.float64):
        assert len(parameter_digest([("x", torch.ones(3).to(dtype)), ("e", torch.empty(0))])) == 64
