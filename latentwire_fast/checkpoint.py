"""Checkpoints that are complete or absent, and what they hold of a run: tensors, optimisers, RNG.

A checkpoint is a folder `step-00001234/` of `NAME.safetensors` files, `state.json` and
`manifest.json` (length and sha256 of every other file, and of itself). A save writes a temporary
sibling folder, syncs every file, the manifest and the folder, renames it into place, syncs the
parent, and only then retires older ones. A folder is trusted only after its manifest verified.
Bytes from disk reach safetensors and JSON, never pickle.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import random
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from latentwire_fast.errors import CheckpointError, TrainingError

logger = logging.getLogger(__name__)

FORMAT = 1
_MANIFEST, _STATE = "manifest.json", "state.json"
_MANIFEST_LIMIT = 1 << 20
# `.step-N.old` was renamed away to make room or to be deleted. It is a candidate like any other: a
# crash between the two renames that replace a step leaves nothing else of that step.
_FOLDER = re.compile(r"step-(\d{8,})|\.step-(\d{8,})\.old")
_TENSOR_FILE = re.compile(r"\w[\w.-]*")


class _Disk:
    """Every change that a save makes on disk, one method each: tests fail at any of them."""

    def create(self, folder: Path) -> None:
        folder.mkdir(parents=True)

    def write_tensors(self, path: Path, tensors: dict[str, Tensor]) -> None:
        # safetensors makes files that only their owner may read; keep what the umask allows
        path.touch()
        mode = path.stat().st_mode
        save_file(tensors, path)
        path.chmod(mode)

    def write_text(self, path: Path, text: str) -> None:
        path.write_text(text, encoding="utf-8")

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


_disk = _Disk()


def write_atomically(path: Path, text: str) -> None:
    """Replace a small text file as a whole: after a crash it holds the old text or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        _disk.write_text(temporary, text)
        _disk.sync(temporary)
        _disk.rename(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    _disk.sync(path.parent)


def publish_folder(temporary: Path, final: Path) -> None:
    """Rename a folder into place once all in it is on disk: after a crash `final` is complete or
    absent."""
    for path in sorted(temporary.rglob("*")):
        _disk.sync(path)
    _disk.sync(temporary)
    _disk.rename(temporary, final)
    _disk.sync(final.parent)


def parameter_digest(named_tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over names, dtypes, shapes and bytes; the order of the pairs does not matter."""
    digest = hashlib.sha256()
    for name, tensor in sorted(named_tensors, key=lambda pair: pair[0]):
        head = json.dumps([name, str(tensor.dtype), list(tensor.shape)])
        digest.update(head.encode())
        # flatten: a 0-d tensor cannot be viewed as bytes
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


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
            _disk.remove(leftover)
        if not folder.exists():
            _disk.create(folder)
            _disk.sync(folder.parent)
        _disk.create(temporary)
        _write_files(temporary, step, tensors, state_text)
        _move_into_place(temporary, final)
        _disk.sync(folder)
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
        _disk.write_tensors(folder / f"{name}.safetensors", copies)
        _disk.sync(folder / f"{name}.safetensors")
    _disk.write_text(folder / _STATE, state_text)
    _disk.sync(folder / _STATE)
    files = {path.name: file_entry(path) for path in folder.iterdir()}
    _disk.write_text(folder / _MANIFEST, _manifest_text(step, files))
    _disk.sync(folder / _MANIFEST)
    _disk.sync(folder)


def _move_into_place(temporary: Path, final: Path) -> None:
    replaced = final.with_name(f".{final.name}.old")
    if not final.exists():
        _disk.rename(temporary, final)
        return
    if replaced.exists():
        _disk.remove(replaced)
    _disk.rename(final, replaced)
    try:
        _disk.rename(temporary, final)
    except OSError:
        replaced.replace(final)
        raise


def _retire(folder: Path, step: int, keep: int) -> None:
    """Delete what the new checkpoint made superfluous; a failure costs space, not safety."""
    kept = 0
    for path in _candidates(folder):
        found = _step_of(path)
        is_old = path.name.startswith(".")
        if not is_old and found <= step and kept < keep:
            kept += 1
            continue
        try:
            old = path if is_old else path.with_name(f".{path.name}.old")
            if not is_old:
                _disk.rename(path, old)
            _disk.remove(old)
        except OSError as error:
            logger.warning("could not delete the retired checkpoint %s: %s", path, error)


def file_entry(path: Path) -> dict[str, Any]:
    """What a manifest says of a file: its length and sha256."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _manifest_text(step: int, files: Mapping[str, Any]) -> str:
    """The one text of a manifest, its own checksum included, so that every flipped byte shows."""
    body: dict[str, Any] = {"format": FORMAT, "step": step, "files": files}
    body["sha256"] = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps(body, sort_keys=True, indent=2) + "\n"


def _step_of(path: Path) -> int:
    match = _FOLDER.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"{path} is not named like a checkpoint (step-00001234)")
    return int(match[1] or match[2])


def _candidates(folder: Path) -> list[Path]:
    """Checkpoint folders, newest step first; of one step, the one in place goes first."""
    found = [path for path in folder.glob("*") if _FOLDER.fullmatch(path.name)]
    return sorted(found, key=lambda p: (_step_of(p), not p.name.startswith(".")), reverse=True)


def verify_checkpoint(path: Path) -> None:
    """Check a checkpoint folder against its manifest.

    Raises:
        CheckpointError: a file is missing, superfluous, of another length, or changed.
    """
    step = _step_of(path)
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
    return Checkpoint(step=_step_of(path), path=path, tensors=tensors, state=state)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU; no other format is ever tried.

    Raises:
        CheckpointError: the file is missing or is not safetensors.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error


def optimizer_state(
    optimizers: Sequence[torch.optim.Optimizer],
    named_parameters: Iterable[tuple[str, nn.Parameter]],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of optimisers by parameter *name*: tensors `INDEX/PARAMETER/KEY`, the rest as JSON.

    Raises:
        CheckpointError: an optimiser has a parameter without a name, or an option that is not JSON.
    """
    names = {parameter: name for name, parameter in named_parameters}
    tensors: dict[str, Tensor] = {}
    saved = []
    for index, optimizer in enumerate(optimizers):
        scalars: dict[str, dict[str, Any]] = {}
        for name, parameter in _by_name(optimizer, names).items():
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{index}/{name}/{key}"] = value
                else:
                    scalars.setdefault(name, {})[key] = value
        groups = [
            {**group, "params": [names[parameter] for parameter in group["params"]]}
            for group in optimizer.param_groups
        ]
        saved.append({"type": type(optimizer).__name__, "groups": groups, "scalars": scalars})
    return tensors, {"optimizers": saved}


def _by_name(
    optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str]
) -> dict[str, nn.Parameter]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    unnamed = sum(p not in names for p in parameters)
    if unnamed:
        raise CheckpointError(
            f"{unnamed} parameters of {type(optimizer).__name__} are not among the named "
            "parameters; pass those of every trained module"
        )
    return {names[p]: p for p in parameters}


def load_optimizer_state(
    optimizers: Sequence[torch.optim.Optimizer],
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> None:
    """The inverse of `optimizer_state`, bit-exact. Parameters may come in another order.

    Raises:
        CheckpointError: optimisers of another kind, or with other parameters; none was changed.
    """
    names = {parameter: name for name, parameter in named_parameters}
    loads = []
    found = len(state["optimizers"])
    if len(optimizers) != found:
        raise CheckpointError(
            f"the checkpoint holds {found} optimisers, this run has {len(optimizers)}; resume with "
            "the configuration of the run folder"
        )
    for index, (optimizer, saved) in enumerate(zip(optimizers, state["optimizers"], strict=True)):
        now = [sorted(names.get(p, "?") for p in g["params"]) for g in optimizer.param_groups]
        then = [sorted(group["params"]) for group in saved["groups"]]
        if (type(optimizer).__name__, now) != (saved["type"], then):
            raise CheckpointError(
                f"optimiser {index}: saved {saved['type']} of {sum(map(len, then))} parameters, "
                f"this run has {type(optimizer).__name__} of {sum(map(len, now))} (or other names "
                "or groups); resume with the configuration of the run folder"
            )
        loads.append(_state_dict(optimizer, index, names, tensors, saved))
    for optimizer, state_dict in zip(optimizers, loads, strict=True):
        optimizer.load_state_dict(state_dict)


def _state_dict(
    optimizer: torch.optim.Optimizer,
    index: int,
    names: Mapping[nn.Parameter, str],
    tensors: Mapping[str, Tensor],
    saved: Mapping[str, Any],
) -> dict[str, Any]:
    """What `optimizer.load_state_dict` takes: parameters numbered in this optimiser's own order."""
    numbers = {name: number for number, name in enumerate(_by_name(optimizer, names))}
    states: dict[int, dict[str, Any]] = {}
    for name, scalars in saved["scalars"].items():
        states.setdefault(numbers[name], {}).update(scalars)
    for key, tensor in tensors.items():
        owner, rest = key.split("/", 1)
        if int(owner) == index:
            name, field = rest.rsplit("/", 1)
            # load_state_dict keeps what it is given, and the optimiser then updates it in place
            states.setdefault(numbers[name], {})[field] = tensor.clone()
    groups = []
    for group, options in zip(optimizer.param_groups, saved["groups"], strict=True):
        restored = {
            key: tuple(value) if isinstance(group.get(key), tuple) else value
            for key, value in options.items()
        }
        groups.append({**restored, "params": [numbers[names[p]] for p in group["params"]]})
    return {"state": states, "param_groups": groups}


def rng_state(
    generators: Mapping[str, random.Random],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of the named generators and of the global ones of python, numpy and torch.

    Returns:
        torch's states as uint8 tensors (`cpu`, and `cuda.N` per device), the others as JSON.
    """
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states = torch.cuda.get_rng_state_all()
        tensors |= {f"cuda.{index}": state for index, state in enumerate(states)}
    # libraries still draw from numpy's global generator, so its state belongs to the run
    legacy = np.random.get_state(legacy=False)  # noqa: NPY002
    return tensors, {
        "python": random.getstate(),
        "numpy": {**legacy, "state": {**legacy["state"], "key": legacy["state"]["key"].tolist()}},
        "named": {name: generator.getstate() for name, generator in generators.items()},
    }


def restore_rng_state(
    generators: Mapping[str, random.Random],
    *,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> None:
    """The inverse of `rng_state`. Another number of CUDA devices than saved is a warning.

    Raises:
        CheckpointError: the named generators are not the saved ones; none was changed.
    """
    if set(generators) != set(state["named"]):
        raise CheckpointError(
            f"the checkpoint holds random generators {sorted(state['named'])}, this run has "
            f"{sorted(generators)}; it was saved by another kind of run"
        )
    for name, generator in generators.items():
        generator.setstate(_python_state(state["named"][name]))
    random.setstate(_python_state(state["python"]))
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(tensors["cpu"])
    devices = torch.cuda.device_count()
    saved = [key for key in tensors if key.startswith("cuda.")]
    if len(saved) != devices:
        logger.warning(
            "saved with %d CUDA devices, resumed with %d: random numbers on them will differ",
            len(saved),
            devices,
        )
    for index in range(min(len(saved), devices)):
        torch.cuda.set_rng_state(tensors[f"cuda.{index}"], index)


def _python_state(saved: Sequence[Any]) -> tuple[Any, ...]:
    version, words, gauss = saved
    return version, tuple(words), gauss


class RunLock:
    """One writer per run folder: `with RunLock(run_dir): ...`, released when the process ends.

    Raises:
        TrainingError: another process holds the folder (the message has its pid), or it cannot be
            locked.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / ".lock"
        self._file: TextIO | None = None

    def __enter__(self) -> RunLock:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = self.path.open("a+", encoding="utf-8")
        except OSError as error:
            raise TrainingError(
                f"cannot write to run folder {self.path.parent}: {error}"
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
