"""A run goes on bit for bit with every encoder and pooler."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from latentwire_fast.config.schema import EncoderConfig, StageConfig
from latentwire_fast.objectives.objective_set import ObjectiveSet
from latentwire_fast.registry import ENCODERS, POOLERS
from runs import assert_same_run, tiny_config, tiny_squad, train

pytestmark = pytest.mark.usefixtures("on_the_cpu")

SHAPE = {"latents": 4, "d_z": 8}
BYTES = {**SHAPE, "width": 16, "layers": 2, "heads": 2, "max_bytes": 256}


def lm(llama: Path, _: Path, pooler: str, **options: Any) -> EncoderConfig:
    config: EncoderConfig = ENCODERS.config(
        "lm", source=str(llama), frozen=True, pooler=POOLERS.config(pooler, **options), **SHAPE
    )
    return config


ENCODER_OF: dict[str, Callable[[Path, Path], EncoderConfig]] = {
    "mean": lambda *folders: lm(*folders, "mean"),
    "hierarchical": lambda *folders: lm(*folders, "hierarchical", heads=2, dropout=0.1),
    "convolution": lambda *folders: lm(*folders, "convolution"),
    "gated_queries": lambda *folders: lm(*folders, "gated_queries", heads=2),
    "pool_expand": lambda *folders: lm(*folders, "pool_expand", heads=2),
    "refiner": lambda *folders: lm(*folders, "refiner", heads=2, dropout=0.1),
    "byte": lambda *_: ENCODERS.config("byte", gate="slots", **BYTES),
    "byte with a pooler": lambda *_: ENCODERS.config(
        "byte", pooler=POOLERS.config("hierarchical", heads=2), **BYTES
    ),
    "token_query": lambda _, bert: ENCODERS.config("token_query", text_encoder=str(bert), **SHAPE),
    "sentence": lambda _, bert: ENCODERS.config("sentence", text_encoder=str(bert), **SHAPE),
    "anchor_guided": lambda llama, bert: ENCODERS.config(
        "anchor_guided", source=str(llama), anchor=str(bert), width=16, layers=1, heads=2, **SHAPE
    ),
}


class Crash(Exception):
    """What no part of the library expects."""


@pytest.mark.parametrize("name", ENCODER_OF)
def test_resuming_is_bit_exact(
    name: str, llama_folder: Path, bert_folder: Path, tmp_path: Path
) -> None:
    """Stopped in the third of four steps."""
    config = tiny_config(
        llama_folder,
        encoder=ENCODER_OF[name](llama_folder, bert_folder),
        data={"source": str(tiny_squad(tmp_path / "data.json"))},
        stages=(StageConfig("answer", steps=2), StageConfig("quantized", steps=2, quantize=6)),
        save_every=1,
    )
    plain = train(config, tmp_path / "plain")
    compute, calls = ObjectiveSet.compute, 0

    def crashing(objectives: ObjectiveSet, *args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:  # two micro-batches a step
            raise Crash
        return compute(objectives, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ObjectiveSet, "compute", crashing)
        with pytest.raises(Crash):
            train(config, tmp_path / "stopped")
    assert_same_run(train(config, tmp_path / "stopped", process=1), plain)
