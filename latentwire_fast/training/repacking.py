"""A trained run with another form of its payloads: nothing is trained but the prior."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from latentwire_fast.config.schema import RunConfig
from latentwire_fast.config.serialization import read_run_config, to_json
from latentwire_fast.errors import ConfigError
from latentwire_fast.files.atomic import replace_folder, write_atomically
from latentwire_fast.files.run_folder import RunFolder
from latentwire_fast.models.bottlenecks.uniform import UniformQuantizer
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.registry import BOTTLENECKS
from latentwire_fast.training.bottleneck_fit import fit_bottleneck
from latentwire_fast.training.builders import build_data


def repack(run: Path, out: Path, *, device: torch.device, **changes: Any) -> Interlingua:
    """Make a run folder whose model sends what that of a trained run does, in version 2.

    Args:
        changes: of the bottleneck's settings, such as `bits`.

    Returns:
        The model.

    Raises:
        ConfigError: there is something in the folder; the run's bottleneck does not send values as
            `uniform` does; or settings that cannot be.
        CheckpointError: the run is not trained.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} holds something already; name a new folder")
    config, model = read_run_config(run), Interlingua.from_pretrained(RunFolder(run).model)
    before = model.bottleneck
    if not isinstance(before, UniformQuantizer):
        raise ConfigError(
            f"{run} has the bottleneck {before.config.kind!r}; only uniform and soft_codebook can "
            "be repacked, others write version 2 already"
        )
    changes = {"version": 2, "running_prior": False, **changes}  # that one is for trainings
    config = replace(config, bottleneck=replace(before.config, **changes))
    shape = {"latents": model.encoder_config.latents, "d_z": model.encoder_config.d_z}
    model.bottleneck = BOTTLENECKS.part_of(config.bottleneck).build(config.bottleneck, **shape)
    counted = ("frequencies_S", "running.")  # of the symbols of before
    state = {k: v for k, v in before.state_dict().items() if not k.startswith(counted)}
    model.bottleneck.load_state_dict(state, strict=False)
    model.to(device).eval()
    if model.bottleneck.fits_texts:
        fit_bottleneck(model, build_data(_without_limit(config), {}).stream, config)
    folder = RunFolder(out)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(folder.config, json.dumps(to_json(config), indent=2) + "\n")
    model.save_pretrained(folder.unfinished_model)
    replace_folder(folder.unfinished_model, folder.model)
    return model


def _without_limit(config: RunConfig) -> RunConfig:
    """A run whose texts may have any length: the limit is in readers' tokens, and the encoder cuts
    what it does not read."""
    return replace(config, data=replace(config.data, max_context_tokens=None))
