"""Named configurations: functions that return a `RunConfig`. `configs/*.json` hold larger ones.

python -m latentwire_fast.train testbed             # pure mode, minutes on two CPU cores
python -m latentwire_fast.train testbed_context     # the compression claim
python -m latentwire_fast.train path/to/config.json
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from latentwire_fast.config import (
    OBJECTIVES,
    AdapterConfig,
    DataConfig,
    EncoderConfig,
    Mode,
    OptimConfig,
    ReaderConfig,
    RunConfig,
    StageConfig,
)
from latentwire_fast.errors import ConfigError
from latentwire_fast.json_files import read_json
from latentwire_fast.stored_config import read_run_config, run_config_from_json

TESTBED_READERS = {
    "llama": ReaderConfig("testbed:llama"),
    "qwen": ReaderConfig("testbed:qwen"),
}


def testbed() -> RunConfig:
    """Pure mode on the testbed: the latent stands for the whole prompt, question included.

    Two rehearsals, because an answer has at most two tokens before its EOS; a slow encoder, because
    it can do the task from the start and only has to make itself understood. The soft tokens begin
    as the reader's own words for that: cross-entropy alone teaches first tokens, and may never
    teach the second ones.
    """
    return RunConfig(
        preset="testbed",
        mode="pure",
        readers=TESTBED_READERS,
        encoder=EncoderConfig(rehearsals=2),
        adapter=AdapterConfig(expansion=8),
        stages=(
            StageConfig("align", steps=80, answer=0.0, embed=1.0),
            StageConfig("answer", steps=120, lr=0.5),
            StageConfig("quantized", steps=500, lr=0.5, quantize=6),
        ),
        optim=OptimConfig(
            batch_size=32,
            muon_lr=0.02,
            adamw_lr=3e-3,
            encoder_lr=0.1,
            warmup_steps=20,
            decay_from=0.25,
        ),
    )


def testbed_context() -> RunConfig:
    """Context-only mode on the testbed: the latent holds every fact, the question comes as text.

    The latents stand at the positions of the text that answers look at, and deep prefixes learn the
    reader's own keys and values there before any answer is asked for (`selection.py`,
    `observation.py`). The encoder's LM is frozen, so the positions stay as they were learned. Half
    of the passages hold two kinds of facts only: facts of one kind are what is told apart last.
    """
    return RunConfig(
        preset="testbed_context",
        mode="context",
        readers=TESTBED_READERS,
        encoder=EncoderConfig(pooling="selected", frozen=True),
        adapter=AdapterConfig(prefix="deep"),
        data=DataConfig(similar=0.5),
        stages=(
            StageConfig("select", steps=100, answer=0.0, select=1.0, kv=1.0),
            StageConfig("match", steps=500, answer=0.0, kv=1.0),
            StageConfig("answer", steps=600, lr=0.5),
            StageConfig("quantized", steps=800, lr=0.5, quantize=6),
        ),
        optim=OptimConfig(
            batch_size=24,
            muon_lr=0.02,
            adamw_lr=3e-3,
            warmup_steps=20,
            decay_from=0.45,
        ),
    )


def testbed_byte() -> RunConfig:
    """The pure-mode run with the byte encoder in the place of the LM: the same budget, for
    comparison."""
    base = testbed()
    return replace(base, preset="testbed_byte", encoder=EncoderConfig(kind="byte"))


def testbed_smoke() -> RunConfig:
    """A few steps of everything (both pretraining tasks, KD, quantisation): does it run at all?"""
    return RunConfig(
        preset="testbed_smoke",
        readers=TESTBED_READERS,
        encoder=EncoderConfig(latents=4, d_z=8, pooling="spans"),
        adapter=AdapterConfig(kind="linear"),
        data=DataConfig(facts=2, eval_examples=8),
        stages=(
            StageConfig("pretrain", steps=2, answer=0.0, autoencode=0.2, continuation=0.8),
            StageConfig("answer", steps=2, kd=0.5),
            StageConfig("quantized", steps=2, quantize=6, answer_tokens=2),
        ),
        optim=OptimConfig(batch_size=4, micro_batch=2, warmup_steps=2),
        log_every=1,
        save_every=2,
    )


PRESETS: dict[str, Callable[[], RunConfig]] = {
    function.__name__: function
    for function in (testbed, testbed_context, testbed_byte, testbed_smoke)
}


def load_preset(name: str) -> RunConfig:
    """A preset by name, or a configuration from a JSON file.

    Raises:
        ConfigError: neither a preset nor a readable configuration file.
    """
    if name in PRESETS:
        return PRESETS[name]()
    path = Path(name)
    if path.suffix != ".json":
        raise ConfigError(f"no preset {name!r}; presets are {', '.join(PRESETS)}, or give a .json")
    return run_config_from_json(read_json(path, error=ConfigError))


def _in_mode(mode: Mode, config: RunConfig) -> RunConfig:
    """A run in this mode, without the stages that only the other has."""
    stages = config.stages if mode == "pure" else _without("embed", config.stages)
    return replace(config, mode=mode, stages=stages)


def _without(objective: str, stages: tuple[StageConfig, ...]) -> tuple[StageConfig, ...]:
    """Stages without an objective; those that have no other are left out."""
    others = [name for name in OBJECTIVES if name != objective]
    off: dict[str, Any] = {objective: 0.0}
    return tuple(
        replace(stage, **off) for stage in stages if any(getattr(stage, name) for name in others)
    )


def _added_to(base: str, config: RunConfig) -> RunConfig:
    """A run that teaches its readers what the encoder of another run writes."""
    kept = read_run_config(Path(base))
    if kept.base is not None:
        raise ConfigError(f"{base} has its encoder from {kept.base}; give that run as the base")
    config = _in_mode(kept.mode, config)
    return replace(
        config,
        base=base,
        encoder=kept.encoder,
        quantizer=kept.quantizer,
        # Its positions are chosen already. What else a stage does with them, readers do.
        stages=_without("select", config.stages),
    )


def with_overrides(
    config: RunConfig,
    *,
    readers: dict[str, str] | None = None,
    encoder: str | None = None,
    data: str | None = None,
    mode: Mode | None = None,
    base: str | None = None,
    seed: int | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    eval_examples: int | None = None,
) -> RunConfig:
    """A configuration with some of its parts replaced; None (or no reader) keeps a part.

    Args:
        readers: sources by name, instead of the configuration's; an LM encoder then starts from the
            first of them unless `encoder` says otherwise.
        base: a trained run to add the readers to; its encoder, quantiser and mode are taken over.
        steps: total over all stages, which shrink or grow in proportion, to one step at least.
    """
    given = {"data": data, "encoder": encoder, "base": base, **(readers or {})}
    for option, value in given.items():
        if value == "":  # an unset variable of a shell, say
            raise ConfigError(f"{option} is given as nothing; leave it out, or name a source")
    if readers:
        config = replace(config, readers={n: ReaderConfig(s) for n, s in readers.items()})
    base = base or config.base
    if base is not None:
        if encoder or mode:
            raise ConfigError(f"--base {base} brings its encoder and mode; leave out the other")
        config = _added_to(base, config)
    elif readers:
        encoder = encoder or next(iter(readers.values()))
    if mode is not None:  # before the steps are counted: it may leave out stages
        config = _in_mode(mode, config)
    if encoder is not None:
        config = replace(config, encoder=replace(config.encoder, source=encoder))
    if data is not None or eval_examples is not None:
        kept = config.data
        count = kept.eval_examples if eval_examples is None else eval_examples
        config = replace(
            config, data=replace(kept, source=data or kept.source, eval_examples=count)
        )
    if steps is not None:
        if steps < 1:
            raise ConfigError(f"steps={steps}, expected at least 1")
        share = steps / config.total_steps
        ends = [round(end * share) for end in accumulate(s.steps for s in config.stages)]
        stages = tuple(
            replace(stage, steps=max(1, end - start))
            for stage, start, end in zip(config.stages, [0, *ends[:-1]], ends, strict=True)
        )
        config = replace(config, stages=stages)
    if batch_size is not None:
        config = replace(config, optim=replace(config.optim, batch_size=batch_size))
    return config if seed is None else replace(config, seed=seed)
