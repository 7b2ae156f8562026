"""Tiny training runs: the smoke preset on the tiny readers, and what two runs are compared by."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latentwire_fast.config.presets import testbed_smoke, weighted
from latentwire_fast.config.schema import AttachmentConfig, ReaderConfig, RunConfig, StageConfig
from latentwire_fast.config.serialization import run_config_from_json, to_json
from latentwire_fast.data.examples import Example
from latentwire_fast.data.testbed import make_examples
from latentwire_fast.errors import RunStopped
from latentwire_fast.files.tensors import parameter_digest
from latentwire_fast.registry import ADAPTERS, ATTACHMENTS
from latentwire_fast.training.optimizer_state import optimizer_state, rng_state
from latentwire_fast.training.trainer import Trainer

TIMES = ("seconds", "cache_seconds", "tokens_per_second")


def soft(adapter: str = "mlp", **options: Any) -> AttachmentConfig:
    """Soft tokens with an adapter of this kind; the options are those of either."""
    own = {key: options.pop(key) for key in ("calibration", "gain", "tanh") if key in options}
    return ATTACHMENTS.config("soft", adapter=ADAPTERS.config(adapter, **options), **own)


def deep(**options: Any) -> AttachmentConfig:
    """A deep prefix."""
    return ATTACHMENTS.config("deep", **options)


def changed(config: RunConfig, **changes: Any) -> RunConfig:
    """The configuration with fields replaced; a dict changes single fields of a part."""
    for key, value in changes.items():
        part = getattr(config, key)
        if dataclasses.is_dataclass(part) and isinstance(value, dict):
            changes[key] = dataclasses.replace(part, **value)
    return dataclasses.replace(config, **changes)


def tiny_config(*folders: Path, **changes: Any) -> RunConfig:
    """`testbed_smoke` on these reader folders (named after the folders): six steps, three stages.

    The adapters have dropout, so that a run depends on the state of torch's random generator.
    """
    config = changed(
        testbed_smoke(),
        readers={folder.name: ReaderConfig(str(folder)) for folder in folders},
        encoder={"source": str(folders[0])},
        attachments=(soft(expansion=1, dropout=0.1),),
        evaluation={"batch_size": 8, "timing_examples": 1, "resamples": 50},
    )
    return changed(config, **changes)


def weighted_stage(name: str, steps: int, **weights: float) -> StageConfig:
    """A stage of objectives with these weights."""
    return StageConfig(name, steps, objectives=weighted(**weights))


def store(config: RunConfig, path: Path) -> Path:
    """The configuration as a file that the training command takes."""
    path.write_text(json.dumps(to_json(config)))
    return path


def stored(path: Path) -> RunConfig:
    """The inverse of `store`."""
    return run_config_from_json(json.loads(path.read_text()))


def squad_file(examples: Sequence[Example], path: Path) -> Path:
    """Examples as a SQuAD v1.1 file, one paragraph per example."""
    paragraphs = [
        {
            "context": e.context,
            "qas": [
                {
                    "id": e.id,
                    "question": e.question,
                    "answers": [{"text": a, "answer_start": e.context.index(a)} for a in e.answers],
                }
            ],
        }
        for e in examples
    ]
    data = {"version": "1.1", "data": [{"title": "tests", "paragraphs": paragraphs}]}
    path.write_text(json.dumps(data))
    return path


def tiny_squad(path: Path, *, passages: int = 7) -> Path:
    """A SQuAD file of short passages, so few that an epoch ends within a few batches."""
    return squad_file(make_examples(passages, seed=5, facts=1), path)


def new_process(seed: int) -> None:
    """Put the generators of python and numpy into a state of their own, as in a fresh process."""
    torch.use_deterministic_algorithms(True)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (the generators that libraries draw from)


def environment_on_the_cpu() -> dict[str, str]:
    """Environment of a process that a test starts: no GPU, one thread, the imports of this one."""
    settings = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **settings, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("ACCELERATE_USE_CPU", None)  # of this process's tests; users do without
    return environment


def train(config: RunConfig, run_dir: Path, *, process: int = 0) -> Trainer:
    """Run to the end, as process number `process` would."""
    new_process(process)
    trainer = Trainer(config, run_dir, progress=False)
    trainer.run()
    return trainer


def stop_after_a_step(config: RunConfig, run_dir: Path, *, match: str | None = None) -> None:
    """Run one step in a process of its own, and stop there as a signal does."""
    new_process(1)
    trainer = Trainer(config, run_dir, progress=False)
    trainer.signals.number = 15
    with pytest.raises(RunStopped, match=match):
        trainer.run()


def assert_resumes(
    config: RunConfig, run_dir: Path, whole: Trainer, *, match: str | None = None
) -> None:
    """A run that is stopped after a step and gone on with is the whole one, bit by bit."""
    stop_after_a_step(config, run_dir, match=match)
    assert_same_run(train(config, run_dir, process=2), whole)


def train_on_the_cpu(config: RunConfig, run_dir: Path) -> Trainer:
    """The same on the CPU, for fixtures of a module, which cannot use the fixture `on_the_cpu`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        return train(config, run_dir)


def training_state(trainer: Trainer) -> dict[str, Any]:
    """Weights, optimisers, random generators and guards; `==` compares them bit by bit."""
    session, state = trainer.session, trainer.session.state
    tensors, options = optimizer_state(state.optimizers, state.named)
    rng_tensors, rng_json = rng_state({})
    return {
        "step": state.step,
        "model": parameter_digest(session.model.trained_state().items()),
        "optimizer": (parameter_digest(tensors.items()), options),
        "rng": (parameter_digest(rng_tensors.items()), rng_json),
        "spikes": state.spikes.state,
    }


def records(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of diagnostics.jsonl without what only the clock decides."""
    lines = (run_dir / "diagnostics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def model_digest(run_dir: Path) -> str:
    """The digest that a saved model names itself by: of its settings and of all its files."""
    return json.loads((run_dir / "model" / "config.json").read_text())["sha256"]


def assert_same_run(found: Trainer, expected: Trainer) -> None:
    """Two runs ended with the same bits and wrote the same records."""
    assert training_state(found) == training_state(expected)
    folders = [trainer.folder.path for trainer in (found, expected)]
    assert records(folders[0]) == records(folders[1])
    assert model_digest(folders[0]) == model_digest(folders[1])


def contents(folder: Path) -> Mapping[str, bytes]:
    """Every file of a folder but the lock, by name."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }
