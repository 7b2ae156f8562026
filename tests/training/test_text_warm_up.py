"""Answers behind the text beside answers behind the latent: a warm-up with a tail, for a LoRA."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from latentwire_fast.config.presets import weighted
from latentwire_fast.config.schema import LoraSettings, RunConfig, StageConfig
from latentwire_fast.config.serialization import run_config_from_json, to_json
from latentwire_fast.errors import ConfigError
from latentwire_fast.registry import SCHEDULES
from runs import assert_resumes, records, tiny_config, train

pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("on_the_cpu")


def config_of(folder: Path, stage: StageConfig) -> RunConfig:
    """One reader with a LoRA."""
    config = tiny_config(folder)
    lora = LoraSettings(rank=2, lr=1.0, dropout=0.2)
    readers = {name: replace(reader, lora=lora) for name, reader in config.readers.items()}
    return replace(config, readers=readers, stages=(stage,))


def test_a_warm_up_goes_from_text_to_latents(llama_folder: Path, tmp_path: Path) -> None:
    schedules = {
        "text.weight": SCHEDULES.config("linear", start=1.0, end=0.1, until_share=0.5),
        "answer.weight": SCHEDULES.config("linear", start=0.0, end=1.0, until_share=0.5),
    }
    objectives = weighted(answer=1.0, text=1.0)
    config = config_of(llama_folder, StageConfig("s", 4, objectives, schedules=schedules))
    assert run_config_from_json(to_json(config)) == config
    whole = train(config, tmp_path / "whole")
    found = records(tmp_path / "whole")
    assert [r["levels"]["text.weight"] for r in found] == pytest.approx([1.0, 0.55, 0.1, 0.1])
    assert found[0]["loss"] == pytest.approx(found[0]["losses"]["text/llama"])
    assert found[0]["grad_norms"]["encoder"] == 0.0
    assert found[-1]["grad_norms"]["encoder"] > 0.0
    assert_resumes(config, tmp_path / "cut", whole)


def test_text_trains_the_updates_alone(llama_folder: Path, tmp_path: Path) -> None:
    stage = StageConfig("s", 1, weighted(text=1.0))
    state = train(config_of(llama_folder, stage), tmp_path).session.state
    moved = {name.split(".")[0] for name, p in state.named if p.grad is not None and p.grad.any()}
    assert moved == {"lora"}
    assert torch.isfinite(torch.tensor(records(tmp_path)[0]["losses"]["text/llama"]))


def test_text_needs_updates(llama_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"objective 'text' trains low-rank .*\['llama'\] have"):
        tiny_config(llama_folder, stages=(StageConfig("s", 1, weighted(text=1.0)),))
