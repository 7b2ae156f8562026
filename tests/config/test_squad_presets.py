"""The presets for real text: what they share, and that their parts run on the testbed."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from latentwire_fast.config.presets import load_preset
from latentwire_fast.training.tracking import read_records
from latentwire_fast.training.trainer import Trainer

PRESETS = ("squad_small", "squad_llama_qwen")


@pytest.mark.parametrize("name", PRESETS)
def test_the_smoke_form_has_the_same_parts(name: str) -> None:
    config, smoke = load_preset(name), load_preset(f"{name}_smoke")
    assert smoke.preset == f"{name}_smoke"
    assert all(reader.source.startswith("testbed:") for reader in smoke.readers.values())
    assert smoke.encoder.kind == config.encoder.kind
    assert smoke.encoder.pooler == config.encoder.pooler  # type: ignore[attr-defined]
    assert [a.kind for a in smoke.attachments] == [a.kind for a in config.attachments]
    assert smoke.bottleneck == config.bottleneck
    for stage, full in zip(smoke.stages, config.stages, strict=True):
        assert stage == replace(full, steps=stage.steps, batch_size=None)
    assert smoke.total_steps <= 8


def test_both_use_the_recipe_that_holds_on_real_text() -> None:
    small, large = map(load_preset, PRESETS)
    assert small.encoder.latents == large.encoder.latents == 32
    for stage, full in zip(small.stages, large.stages, strict=True):
        assert set(stage.objectives) == {o for o in full.objectives if o.kind != "kd"}
    assert {reader.source for reader in small.readers.values()} == {
        "package:smollm2",
        "package:gemma3",
    }


@pytest.mark.usefixtures("on_the_cpu")
def test_the_parts_of_squad_small_run(tmp_path: Path) -> None:
    config = load_preset("squad_small_smoke")
    trainer = Trainer(config, tmp_path, progress=False)
    trainer.run()
    records = read_records(trainer.folder.diagnostics)
    assert [r["stage"] for r in records] == [s.name for s in config.stages for _ in range(2)]
    assert all(math.isfinite(r["loss"]) for r in records)
