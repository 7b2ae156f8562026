"""Stages in epochs: how many steps they have follows from the data."""

from __future__ import annotations

import math
from dataclasses import replace

from latentwire_fast.config.schema import RunConfig, StageConfig
from latentwire_fast.data.streams import ExampleStream
from latentwire_fast.errors import ConfigError
from latentwire_fast.training.builders import RunData


def with_steps(config: RunConfig, data: RunData) -> RunConfig:
    """A configuration in which stages in epochs have the number of steps that they take.

    Raises:
        ConfigError: a stage in epochs on data without an end.
    """
    return replace(config, stages=tuple(_with_steps(s, config, data) for s in config.stages))


def _with_steps(stage: StageConfig, config: RunConfig, data: RunData) -> StageConfig:
    if stage.epochs is None:
        return stage
    stream = data.stream_of(stage)
    if not isinstance(stream, ExampleStream):
        raise ConfigError(
            f"stage {stage.name!r}: epochs={stage.epochs}, and {config.data.source} has no end; "
            "give steps"
        )
    size = stage.batch_size or config.optim.batch_size
    whole = stage.epochs * stream.epoch_steps(size, texts=stage.takes_texts)
    return replace(stage, steps=max(1, math.ceil(whole)), epochs=None)
