"""A curriculum of latents: at a stage with fewer of them, the run goes on as another model that
takes over the weights of the checkpoint before it.

A hand-over is a resume: the run saves, and opens again for its next step. So a run that was stopped
there goes on to the bit. Optimisers begin anew, for their running means are of other shapes.

Shapes: M latents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentwire_fast.config.latents import has_curriculum, stage_latents
from latentwire_fast.config.schema import RunConfig
from latentwire_fast.config.stage import HandOver
from latentwire_fast.errors import CheckpointError
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.training.checkpoint import latest_checkpoint, step_of


def wanted_latents(config: RunConfig, step: int) -> int:
    """How many latents a 0-based step of a run has."""
    return stage_latents(config.stage_at(step)[0], config.encoder.latents)


def of_newest_step(config: RunConfig, checkpoints: Path) -> RunConfig:
    """The configuration that a model is built from: with the latents of the step that the run goes
    on from.

    Raises:
        CheckpointError: all checkpoints are damaged.
    """
    if not has_curriculum(config.stages, config.encoder.latents):
        return config
    newest = latest_checkpoint(checkpoints)
    if newest is None:
        return _with_latents(config, wanted_latents(config, 0))
    # Its weights are taken over: it does not begin as in another run.
    found = _with_latents(config, wanted_latents(config, step_of(newest)))
    return replace(found, warm_start={})


def _with_latents(config: RunConfig, latents: int) -> RunConfig:
    """The configuration of a model with so many latents, without a curriculum."""
    changes: dict[str, Any] = {"latents": latents}
    stages = tuple(replace(stage, latents=None, hand_over="first") for stage in config.stages)
    return replace(config, encoder=replace(config.encoder, **changes), stages=stages)


def check_hand_overs(
    config: RunConfig, model: Interlingua, build: Callable[[RunConfig], Interlingua]
) -> None:
    """Raise unless the model of every later stage can take over this one's weights: now, not after
    hours.

    Args:
        build: makes the model of a configuration.

    Raises:
        CheckpointError: one cannot, and which of its weights.
    """
    if any(reader.lora is not None for reader in config.readers.values()):
        return  # a reader takes one set of updates; those are the same for all latents
    counts = {stage_latents(stage, config.encoder.latents) for stage in config.stages}
    for count in sorted(count for count in counts if count < model.encoder_config.latents):
        with torch.random.fork_rng(devices=[]):
            smaller = build(replace(_with_latents(config, count), warm_start={}))
        hand_over(model.trained_state(), smaller.trained_state(), "first")


def hand_over(
    saved: Mapping[str, Tensor], own: Mapping[str, Tensor], how: HandOver
) -> dict[str, Tensor]:
    """The weights of a model with fewer latents, from those of one with more.

    Args:
        saved: the weights to take over.
        own: those of the model that takes them over, for their shapes.
        how: what has one entry for each latent keeps the `first` ones, or the `mean` of neighbours.

    Raises:
        CheckpointError: a tensor is missing, or differs in more than one length.
    """
    return {name: _reduced(name, saved.get(name), tensor, how) for name, tensor in own.items()}


def _reduced(name: str, saved: Tensor | None, own: Tensor, how: HandOver) -> Tensor:
    if saved is not None and saved.shape == own.shape:
        return saved
    differ = (
        []
        if saved is None or saved.dim() != own.dim()
        else [i for i in range(own.dim()) if saved.shape[i] != own.shape[i]]
    )
    if saved is None or len(differ) != 1 or saved.shape[differ[0]] < own.shape[differ[0]]:
        there = "absent" if saved is None else [*saved.shape]
        raise CheckpointError(
            f"{name} is {there} with more latents and {[*own.shape]} with fewer: it has not one "
            "entry for each latent, and cannot be handed over; train with one number of latents"
        )
    (place,) = differ
    count = own.shape[place]
    if how == "first":
        return saved.narrow(place, 0, count).contiguous()
    rows = saved.movedim(place, -1)
    flat = nn.functional.adaptive_avg_pool1d(rows.reshape(1, -1, rows.shape[-1]).float(), count)
    return flat.reshape(*rows.shape[:-1], count).movedim(-1, place).to(saved.dtype).contiguous()
