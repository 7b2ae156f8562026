"""Checkpoints that are complete or absent: named tensors and JSON values of one step.

A checkpoint is a folder `step-00001234/` of `NAME.safetensors` files, `state.json` and
`manifest.json` (length and sha256 of every other file, and of itself). A save writes a temporary
sibling folder, syncs every file, the manifest and the folder, renames it into place, syncs the
parent, and only then retires older ones. A folder is trusted only after its manifest verified.
Bytes from disk reach safetensors and JSON, never pickle.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from latentwire_fast.errors import CheckpointError
from latentwire_fast.files import atomic
from latentwire_fast.files.atomic import file_entry
from latentwire_fast.files.tensors import read_tensors

logger = logging.getLogger(__name__)

FORMAT = 2  # 1 had the random state of one process only
_MANIFEST, _STATE = "manifest.json", "state.json"
_MANIFEST_LIMIT = 1 << 20
# `.step-N.old` was renamed away to make room or to be deleted. It is a candidate like any other: a
# crash between the two renames that replace a step leaves nothing else of that step.
_FOLDER = re.compile(r"step-(\d{8,})|\.step-(\d{8,})\.old")
_TENSOR_FILE = re.compile(r"\w[\w.-]*")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint, its tensors on the CPU.

    Attributes:
        step: the step it was saved at.
        path: its folder.
        tensors: per file (without `.safetensors`) the tensors by name.
        state: what was given as `state`, after JSON (tuples are lists, keys are strings).
    """

    step: int
    path: Path
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """Save `folder/step-N`, then retire what is not among the `keep` newest.

    A complete `step-N` that exists is replaced. Checkpoints of later steps are retired too: a run
    that saves an earlier step was resumed from before them, and must not return to what it left.

    Args:
        folder: created when missing; one writer at a time (`RunLock`).
        tensors: per file name (letters, digits, `_.-`) the tensors to store, from any device.
        state: JSON values.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: a bad argument, or the disk refused; the checkpoints before it are intact.
    """
    if step < 0 or keep < 1:
        raise CheckpointError(f"step={step}, keep={keep}: expected step >= 0 and keep >= 1")
    for name in tensors:
        if not _TENSOR_FILE.fullmatch(name):
            raise CheckpointError(f"{name!r} cannot name a tensor file; use letters, digits, _ . -")
    try:
        state_text = json.dumps(state)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"state of step {step} is not JSON: {error}") from error
    final = folder / f"step-{step:08d}"
    temporary = folder / f".{final.name}.tmp"
    try:
        for leftover in folder.glob(".step-*.tmp"):
            atomic.disk.remove(leftover)
        if not folder.exists():
            atomic.disk.create(folder)
            atomic.disk.sync(folder.parent)
        atomic.disk.create(temporary)
        _write_files(temporary, step, tensors, state_text)
        _move_into_place(temporary, final)
        atomic.disk.sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"could not save step {step} in {folder}: {error}; earlier checkpoints are untouched. "
            "Make room or fix the folder's permissions, then resume"
        ) from error
    _retire(folder, step, keep)
    return final


def _write_files(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state_text: str
) -> None:
    for name, part in tensors.items():
        # A copy each: safetensors refuses tensors that share memory, such as tied weights.
        copies = {
            key: t.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for key, t in part.items()
        }
        atomic.disk.write_tensors(folder / f"{name}.safetensors", copies)
        atomic.disk.sync(folder / f"{name}.safetensors")
    atomic.disk.write_bytes(folder / _STATE, state_text.encode())
    atomic.disk.sync(folder / _STATE)
    files = {path.name: file_entry(path) for path in folder.iterdir()}
    atomic.disk.write_bytes(folder / _MANIFEST, _manifest_text(step, files).encode())
    atomic.disk.sync(folder / _MANIFEST)
    atomic.disk.sync(folder)


def _move_into_place(temporary: Path, final: Path) -> None:
    replaced = final.with_name(f".{final.name}.old")
    if not final.exists():
        atomic.disk.rename(temporary, final)
        return
    if replaced.exists():
        atomic.disk.remove(replaced)
    atomic.disk.rename(final, replaced)
    try:
        atomic.disk.rename(temporary, final)
    except OSError:
        replaced.replace(final)
        raise


def _retire(folder: Path, step: int, keep: int) -> None:
    """Delete what the new checkpoint made superfluous; a failure costs space, not safety."""
    kept = 0
    for path in _candidates(folder):
        found = step_of(path)
        is_old = path.name.startswith(".")
        if not is_old and found <= step and kept < keep:
            kept += 1
            continue
        try:
            old = path if is_old else path.with_name(f".{path.name}.old")
            if not is_old:
                atomic.disk.rename(path, old)
            atomic.disk.remove(old)
        except OSError as error:
            logger.warning("could not delete the retired checkpoint %s: %s", path, error)


def _manifest_text(step: int, files: Mapping[str, Any]) -> str:
    """The one text of a manifest, its own checksum included, so that every flipped byte shows."""
    body: dict[str, Any] = {"format": FORMAT, "step": step, "files": files}
    body["sha256"] = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps(body, sort_keys=True, indent=2) + "\n"


def step_of(path: Path) -> int:
    """The step that a checkpoint's folder is of.

    Raises:
        CheckpointError: it is not named like one.
    """
    match = _FOLDER.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"{path} is not named like a checkpoint (step-00001234)")
    return int(match[1] or match[2])


def _candidates(folder: Path) -> list[Path]:
    """Checkpoint folders, newest step first; of one step, the one in place goes first."""
    found = [path for path in folder.glob("*") if _FOLDER.fullmatch(path.name)]
    return sorted(found, key=lambda p: (step_of(p), not p.name.startswith(".")), reverse=True)


def verify_checkpoint(path: Path) -> None:
    """Check a checkpoint folder against its manifest.

    Raises:
        CheckpointError: a file is missing, superfluous, of another length, or changed.
    """
    step = step_of(path)
    try:
        manifest = path / _MANIFEST
        if manifest.stat().st_size > _MANIFEST_LIMIT:
            raise CheckpointError(f"{manifest} is too long for a manifest")
        text = manifest.read_text(encoding="utf-8")
        body = json.loads(text)
        version, files = body["format"], body["files"]
        if version != FORMAT or not isinstance(files, dict):
            raise CheckpointError(
                f"{path} has checkpoint format {version}, this version reads {FORMAT}"
            )
        if text != _manifest_text(step, files):
            raise CheckpointError(f"{manifest} was changed after it was written")
        present = {file.name for file in path.iterdir()} - {_MANIFEST}
        if present != set(files):
            raise CheckpointError(
                f"{path} holds other files than its manifest: {sorted(present ^ set(files))}"
            )
        for name, entry in files.items():
            # the length first: it costs nothing and finds most damage
            if (path / name).stat().st_size != entry["bytes"] or file_entry(path / name) != entry:
                raise CheckpointError(f"{path / name} is damaged: not what the manifest recorded")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a complete checkpoint: {error!r}") from error


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in `folder` that verifies; None when there is none at all.

    A damaged one is passed over with a warning.

    Raises:
        CheckpointError: there are checkpoints and all are damaged.
    """
    candidates = _candidates(folder)
    for path in candidates:
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            logger.warning("passing over a damaged checkpoint: %s", error)
        else:
            return path
    if candidates:
        raise CheckpointError(
            f"all {len(candidates)} checkpoints in {folder} are damaged; restore one, or delete "
            "the folder to start again"
        )
    return None


def has_checkpoint(folder: Path) -> bool:
    """Whether there is a checkpoint in `folder`, intact or damaged."""
    return bool(_candidates(folder))


def load_checkpoint(path: Path) -> Checkpoint:
    """Load one checkpoint (`.../step-N`), or the newest intact one of a folder.

    Raises:
        CheckpointError: nothing to load, or the given checkpoint is damaged.
    """
    if _FOLDER.fullmatch(path.name):
        verify_checkpoint(path)
    else:
        latest = latest_checkpoint(path)
        if latest is None:
            raise CheckpointError(f"no checkpoint in {path}; train first, or give another folder")
        path = latest
    tensors = {file.stem: read_tensors(file) for file in sorted(path.glob("*.safetensors"))}
    state = json.loads((path / _STATE).read_text(encoding="utf-8"))
    return Checkpoint(step=step_of(path), path=path, tensors=tensors, state=state)
