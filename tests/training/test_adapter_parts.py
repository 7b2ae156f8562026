"""Adapters and attachments in runs of a few steps: trained, saved, loaded, resumed; and parts that
begin as in another run."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from latentwire_fast.config.presets import weighted
from latentwire_fast.config.schema import AttachmentConfig, RunConfig, StageConfig
from latentwire_fast.config.serialization import run_config_from_json, to_json
from latentwire_fast.errors import CheckpointError, ConfigError
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.registry import ADAPTERS, ATTACHMENTS
from runs import (
    assert_resumes,
    deep,
    records,
    soft,
    tiny_config,
    train,
)

pytestmark = pytest.mark.usefixtures("on_the_cpu")

PARTS = {
    "film": soft("film"),
    "positions": soft("linear", positions=True),
    "matched": ATTACHMENTS.config("soft_matched", adapter=ADAPTERS.config("linear")),
}


def config_of(folder: Path, attachment: AttachmentConfig, **changes: Any) -> RunConfig:
    """Two steps of answers and of the penalty on scales."""
    stage = StageConfig("s", steps=2, objectives=weighted(answer=1.0, scales=0.1), quantize=6)
    return tiny_config(folder, attachments=(attachment,), stages=(stage,), **changes)


@pytest.mark.parametrize("part", PARTS)
def test_a_part_is_trained_saved_loaded_and_resumed(
    part: str, llama_folder: Path, tmp_path: Path
) -> None:
    config = config_of(llama_folder, PARTS[part])
    assert run_config_from_json(to_json(config)) == config
    whole = train(config, tmp_path / "whole")
    assert_resumes(config, tmp_path / "cut", whole)
    found = records(tmp_path / "whole")
    assert found[0]["losses"]["scales/llama"] == 0.0
    assert found[1]["losses"]["scales/llama"] > 0.0
    model = Interlingua.from_pretrained(whole.folder.model)
    latent = torch.randn(3, 4, 8)
    ours = whole.session.model.eval().prefix("llama", latent)
    assert torch.equal(model.prefix("llama", latent), ours)
    assert torch.equal(model.prefix("llama", latent[:1]), ours[:1]), "it does not depend on others"


def test_matched_channels_are_the_readers(llama_folder: Path, tmp_path: Path) -> None:
    trainer = train(config_of(llama_folder, PARTS["matched"]), tmp_path)
    session = trainer.session
    part: Any = session.model.attachments["llama"]["soft_matched"].train()
    with torch.no_grad():
        part.gamma.fill_(1.0)
        part.beta.zero_()
        rows = part(torch.randn(64, 4, 8)).flatten(0, 1)
    embedding = session.readers["llama"].embedding.weight
    torch.testing.assert_close(rows.mean(0), embedding.mean(0), rtol=0, atol=1e-4)
    wanted = embedding.std(0, correction=0)
    torch.testing.assert_close(rows.std(0, correction=0), wanted, rtol=1e-2, atol=1e-4)
    before = part.normed.running_mean.clone()
    part.rms(torch.randn(5, 4, 8))
    assert torch.equal(part.normed.running_mean, before), "a log changes nothing"


def test_parts_check_themselves(llama_folder: Path) -> None:
    with pytest.raises(ConfigError, match="calibration='token', expected 'none'"):
        ATTACHMENTS.config("soft_matched", calibration="token")
    with pytest.raises(ConfigError, match=r"momentum=0.0, expected in \(0, 1\]"):
        ATTACHMENTS.config("soft_matched", momentum=0.0)
    with pytest.raises(ConfigError, match="objective 'scales' needs an attachment 'soft' or"):
        config_of(llama_folder, deep(width=16, heads=2))


def test_parts_begin_as_in_another_run(
    llama_folder: Path, qwen_folder: Path, tmp_path: Path
) -> None:
    first = train(config_of(llama_folder, soft("film")), tmp_path / "first")
    there = first.session.model.state_dict()
    config = replace(
        config_of(llama_folder, soft("film"), seed=3),
        warm_start={"encoder": str(tmp_path / "first")},
        stages=(StageConfig("s", steps=1, objectives=weighted(answer=1.0), frozen=("encoder",)),),
    )
    here = train(config, tmp_path / "second").session.model.state_dict()
    assert all(torch.equal(here[n], there[n]) for n in there if n.startswith("encoder."))
    name = "attachments.llama.soft.adapter.slots"
    assert not torch.allclose(here[name], there[name], atol=0.02)
    config = replace(config, warm_start={"all": str(tmp_path / "first")}, readers=config.readers)
    here = train(config, tmp_path / "third").session.model.state_dict()
    assert torch.allclose(here[name], there[name], atol=0.02)


def test_a_run_begins_with_the_newest_checkpoint_of_an_unfinished_one(
    llama_folder: Path, tmp_path: Path
) -> None:
    first = train(config_of(llama_folder, soft("film")), tmp_path / "first")
    shutil.rmtree(first.folder.model)
    there = first.session.model.state_dict()
    config = replace(
        config_of(llama_folder, soft("film")), warm_start={"all": str(tmp_path / "first")}
    )
    stage = replace(config.stages[0], steps=1, lr=1e-9)
    here = train(replace(config, stages=(stage,)), tmp_path / "second").session.model.state_dict()
    assert all(torch.allclose(here[name], there[name], atol=1e-6) for name in there)


def test_parts_that_do_not_fit_are_named(llama_folder: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    train(config_of(llama_folder, soft("film")), first)
    other = config_of(llama_folder, soft("linear"))
    for part, message in (
        ("attachments.llama", r"soft.adapter.condition.weight is .* there and absent here"),
        ("decoder", "this run has no part 'decoder'"),
    ):
        config = replace(other, warm_start={part: str(first)})
        with pytest.raises(ConfigError, match=message):
            train(config, tmp_path / part)
    with pytest.raises(
        CheckpointError, match=r"neither model/model\.safetensors nor a checkpoint; name a run"
    ):
        train(replace(other, warm_start={"encoder": str(tmp_path)}), tmp_path / "none")
