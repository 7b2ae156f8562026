"""Named configurations: functions that return a `RunConfig`. `configs/*.json` hold larger ones.

python -m latentwire_fast.train testbed             # pure mode, minutes on two CPU cores
python -m latentwire_fast.train testbed_context     # the compression claim
python -m latentwire_fast.train path/to/config.json
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from latentwire_fast.config.schema import (
    AdapterConfig,
    DataConfig,
    EncoderConfig,
    OptimConfig,
    ReaderConfig,
    RunConfig,
    StageConfig,
)
from latentwire_fast.config.serialization import run_config_from_json
from latentwire_fast.errors import ConfigError
from latentwire_fast.files.json_files import read_json

# More threads wait for one another, and spin while they do. Milliseconds of a step of `testbed` on
# two cores, alone and beside one busy process: one thread 688 and 784, two 596 and 1,696, two that
# sleep while they wait 974 and 1,660. And one thread gives the same losses on any number of cores.
TESTBED_THREADS = 1

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
        threads=TESTBED_THREADS,
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
        threads=TESTBED_THREADS,
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
        threads=TESTBED_THREADS,
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
