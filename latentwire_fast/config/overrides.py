"""A configuration with some of its parts replaced, as the command line asks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Literal

from latentwire_fast.config.schema import (
    DataConfig,
    Mode,
    ObjectiveConfig,
    ReaderConfig,
    RunConfig,
    StageConfig,
)
from latentwire_fast.config.serialization import read_run_config
from latentwire_fast.errors import ConfigError


def _in_mode(mode: Mode, config: RunConfig) -> RunConfig:
    """A run in this mode, without the objectives that only the other has."""
    stages = _with_objectives(config.stages, lambda objective: mode in objective.modes)
    return replace(config, mode=mode, stages=stages)


def _with_objectives(
    stages: tuple[StageConfig, ...], keep: Callable[[ObjectiveConfig], bool]
) -> tuple[StageConfig, ...]:
    """Stages with the objectives to keep; a stage that has nothing left to train is left out."""
    kept = []
    for stage in stages:
        objectives = tuple(filter(keep, stage.objectives))
        if any(objective.weight for objective in objectives):
            kept.append(replace(stage, objectives=objectives))
    return tuple(kept)


def _added_to(base: str, config: RunConfig) -> RunConfig:
    """A run that teaches its readers what the encoder of another run writes."""
    base_config = read_run_config(Path(base))
    if base_config.base is not None:
        raise ConfigError(
            f"{base} has its encoder from {base_config.base}; give that run as the base"
        )
    config = _in_mode(base_config.mode, config)
    return replace(
        config,
        base=base,
        encoder=base_config.encoder,
        bottleneck=base_config.bottleneck,
        private_slots=base_config.private_slots,
        # Its latents are what they are, and its positions chosen. What else a stage does with them,
        # readers do.
        stages=_with_objectives(config.stages, lambda o: not (o.teaches_positions or o.of_latents)),
    )


def _with_readers(sources: dict[str, str], config: RunConfig) -> RunConfig:
    """A run with readers from these sources in the place of its own."""
    small = all(source.startswith("testbed:") for source in sources.values())
    return replace(
        config,
        readers={name: ReaderConfig(source) for name, source in sources.items()},
        threads=config.threads if small else None,
    )


def _with_data(
    config: DataConfig, source: str | None, eval_source: str | None, count: int | None
) -> DataConfig:
    """Other data. A new source without an `eval_source` brings its own held-out part."""
    if source is not None:
        config = replace(config, source=source, eval_source=None)
    if eval_source is not None:
        config = replace(config, eval_source=eval_source)
    return config if count is None else replace(config, eval_examples=count)


def _in_steps(steps: int, config: RunConfig) -> RunConfig:
    """A run of so many steps in all; every stage keeps its share, and one step at least."""
    if steps < 1:
        raise ConfigError(f"steps={steps}, expected at least 1")
    for stage in config.stages:
        if stage.epochs is not None:
            raise ConfigError(
                f"steps={steps}: stage {stage.name!r} is as long as its epochs={stage.epochs}; "
                "change that in the configuration"
            )
    share = steps / config.total_steps
    ends = [round(end * share) for end in accumulate(s.steps for s in config.stages)]
    stages = tuple(
        replace(stage, steps=max(1, end - start))
        for stage, start, end in zip(config.stages, [0, *ends[:-1]], ends, strict=True)
    )
    return replace(config, stages=stages)


def with_overrides(
    config: RunConfig,
    *,
    readers: dict[str, str] | None = None,
    encoder: str | None = None,
    data: str | None = None,
    eval_data: str | None = None,
    mode: Mode | None = None,
    base: str | None = None,
    seed: int | None = None,
    steps: int | None = None,
    minutes: float | None = None,
    batch_size: int | None = None,
    eval_examples: int | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
) -> RunConfig:
    """A configuration with some of its parts replaced; None (or no reader) keeps a part.

    Args:
        readers: sources by name, instead of the configuration's; an encoder that starts from an LM
            then starts from the first of them unless `encoder` says otherwise. Readers from outside
            the testbed may be large, so torch then chooses the number of threads.
        base: a trained run to add the readers to; its encoder, bottleneck and mode are taken over.
        dtype: of every reader.
        steps: total over all stages, which shrink or grow in proportion, to one step at least.
        minutes: of training at most.
    """
    sources = {
        "data": data,
        "eval_data": eval_data,
        "encoder": encoder,
        "base": base,
        **(readers or {}),
    }
    for option, value in sources.items():
        if value == "":  # an unset variable of a shell, say
            raise ConfigError(f"{option} is given as nothing; leave it out, or name a source")
    if readers:
        config = _with_readers(readers, config)
    base = base or config.base
    if base is not None:
        if encoder or mode:
            raise ConfigError(f"--base {base} brings its encoder and mode; leave out the other")
        config = _added_to(base, config)
    elif readers and encoder is None and config.encoder.source is not None:
        encoder = next(iter(readers.values()))
    if mode is not None:  # before the steps are counted: it may leave out stages
        config = _in_mode(mode, config)
    if encoder is not None:
        config = replace(config, encoder=config.encoder.with_source(encoder))
    config = replace(config, data=_with_data(config.data, data, eval_data, eval_examples))
    if steps is not None:
        config = _in_steps(steps, config)
    if minutes is not None:
        config = replace(config, minutes=minutes)
    if batch_size is not None:
        config = replace(config, optim=replace(config.optim, batch_size=batch_size))
    if dtype is not None:
        loaded = {name: replace(reader, dtype=dtype) for name, reader in config.readers.items()}
        config = replace(config, readers=loaded)
    return config if seed is None else replace(config, seed=seed)
