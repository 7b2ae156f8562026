"""Parts of a fresh model that begin as in another run."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from latentwire_fast.errors import CheckpointError, ConfigError
from latentwire_fast.files.run_folder import RunFolder
from latentwire_fast.files.tensors import read_tensors
from latentwire_fast.training.checkpoint import latest_checkpoint, load_checkpoint
from latentwire_fast.training.frozen_parts import is_within

ALL = "all"  # whatever both models have


@torch.no_grad()
def warm_start(model: nn.Module, part: str, run: Path) -> None:
    """Take the values of one part from the model of a trained run.

    Args:
        part: a name from the left (`encoder`, `attachments.llama`); `all`: every tensor that both
            models have in one shape.
        run: its folder. Of a run that is not finished, the newest checkpoint is taken.

    Raises:
        ConfigError: one of the two models has no such part, or it has other tensors there.
        CheckpointError: the run has neither a trained model nor a checkpoint.
    """
    saved = _weights(run)
    own = model.state_dict(keep_vars=True)
    if part == ALL:
        names = {name for name in own.keys() & saved.keys() if own[name].shape == saved[name].shape}
    else:
        here, there = ({n for n in names if is_within(n, [part])} for names in (own, saved))
        if not here or not there:
            where = "this run" if not here else str(run)
            raise ConfigError(f"warm_start: {where} has no part {part!r}; name one that both have")
        differ = [n for n in sorted(here | there) if _shape(own, n) != _shape(saved, n)]
        if differ:
            name = differ[0]
            raise ConfigError(
                f"warm_start: {part!r} of {run} is built in another way: {name} is "
                f"{_shape(saved, name)} there and {_shape(own, name)} here; use its settings"
            )
        names = here
    if not names:
        raise ConfigError(f"warm_start: {run} has nothing that fits this run")
    for name in sorted(names):
        own[name].copy_(saved[name].to(own[name]))


def _weights(run: Path) -> dict[str, Tensor]:
    """The trained tensors of a run."""
    folder = RunFolder(run)
    weights = folder.model / "model.safetensors"
    if weights.is_file():
        return read_tensors(weights)
    newest = latest_checkpoint(folder.checkpoints)
    if newest is None:
        raise CheckpointError(
            f"warm_start: {run} has neither {weights.relative_to(run)} nor a checkpoint; name a "
            "run that has trained"
        )
    return load_checkpoint(newest).tensors["model"]


def _shape(tensors: dict[str, torch.Tensor], name: str) -> str:
    """The shape of a tensor in words."""
    return str([*tensors[name].shape]) if name in tensors else "absent"
