"""Frozen work on disk: the same training up to the rounding to fp16, and one flag against it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from latentwire_fast.config.presets import weighted
from latentwire_fast.config.schema import RunConfig, StageConfig
from latentwire_fast.objectives.continuation import halves
from latentwire_fast.registry import ENCODERS, POOLERS
from latentwire_fast.training import frozen_work
from latentwire_fast.training.trainer import Trainer
from runs import changed, deep, new_process, records, tiny_config, tiny_squad

POOLED: dict[str, Any] = {
    "cross_attention": {"heads": 2, "layers": 1, "states": 2},
    "layer_spans": {"heads": 2, "layers": 1, "states": 2},
    "spans": {},
    "selected": {},
}


@pytest.fixture(params=POOLED)
def config(
    request: pytest.FixtureRequest, llama_folder: Path, qwen_folder: Path, tmp_path: Path
) -> RunConfig:
    """Two epochs of everything that is kept."""
    kind = request.param
    extra = (
        {"select": 1.0, "kv": 1.0}
        if kind == "selected"
        else {"attention": 1.0, "attention_continued": 1.0}
    )
    objectives = weighted(kd=1.0, **extra)
    if kind != "selected":
        stages = (StageConfig("all", steps=4, objectives=objectives),)
    else:
        match = StageConfig("match", steps=3, objectives=weighted(kv=1.0))
        stages = (StageConfig("all", steps=1, objectives=objectives), match)
    encoder = ENCODERS.config(
        "lm",
        source=str(llama_folder),
        latents=4,
        d_z=8,
        frozen=True,
        pooler=POOLERS.config(kind, **POOLED[kind]),
    )
    return changed(
        tiny_config(llama_folder, qwen_folder),
        encoder=encoder,
        attachments=(deep(width=16, heads=2, expansion=1, in_place=kind != "selected"),),
        data={"source": str(tiny_squad(tmp_path / "data.json", passages=6))},
        stages=stages,
    )


def run(config: RunConfig, folder: Path, *, cache: bool) -> Trainer:
    new_process(0)
    trainer = Trainer(config, folder, progress=False, cache=cache)
    trainer.run()
    return trainer


def test_kept_or_not_the_training_is_the_same(config: RunConfig, tmp_path: Path) -> None:
    kept = run(config, tmp_path / "kept", cache=True)
    plain = run(config, tmp_path / "plain", cache=False)
    assert not plain.folder.frozen_work.exists()
    cache = kept.session.objectives.teacher
    assert cache is not None
    assert cache.hits > 0
    states = kept.session.model.encoder.states_cache
    assert states is not None
    contexts = {item.context for item in kept.session.stream.items}
    halved = config.encoder.pooler.kind != "selected"  # by `attention_continued`
    read = contexts | ({halves(text)[0] for text in contexts} if halved else set())
    assert states.misses == len(read)
    assert states.hits > 0
    for ours, theirs in zip(records(tmp_path / "kept"), records(tmp_path / "plain"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-2)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-2)


def test_the_size_is_said_before_and_the_flag_removes_it(
    config: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    monkeypatch.setattr(frozen_work, "WORTH_A_WORD", 0)
    config = changed(config, save_every=1)
    with caplog.at_level(logging.WARNING):
        trainer = run(config, tmp_path / "run", cache=True)
    assert "--no-cache" in caplog.text
    items = trainer.session.stream.items
    said = frozen_work.estimated_bytes(trainer.session.objectives, trainer.config, items)
    files = trainer.folder.frozen_work.glob("*.bin")
    assert sum(path.stat().st_size for path in files) == pytest.approx(said, rel=0.3)
    run(config, tmp_path / "other", cache=False)
    assert not (tmp_path / "other" / "frozen_work").exists()


def test_what_does_not_fit_is_not_kept(
    config: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    monkeypatch.setattr(frozen_work.shutil, "disk_usage", lambda _: type("Disk", (), {"free": 10}))
    with caplog.at_level(logging.WARNING):
        trainer = run(config, tmp_path / "run", cache=True)
    assert "do not fit" in caplog.text
    assert trainer.session.objectives.teacher is None
    assert not trainer.folder.frozen_work.exists()
