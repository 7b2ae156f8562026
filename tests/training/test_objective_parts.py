"""Objectives in runs of a few steps: trained, saved, loaded, resumed to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from latentwire_fast.config.schema import ObjectiveConfig, RunConfig, StageConfig
from latentwire_fast.config.serialization import run_config_from_json, to_json
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.registry import POOLERS, SCHEDULES
from runs import assert_resumes, records, tiny_config, train
from stage_batches import objective

pytestmark = pytest.mark.usefixtures("on_the_cpu")

OBJECTIVES_OF: dict[str, tuple[ObjectiveConfig, ...]] = {
    "label smoothing": (objective("answer", label_smoothing=0.1),),
    "first_token": (objective("first_token", auto_scale=1.0),),
    "hidden_kd": (objective("hidden_kd", layers=(1, -1)), objective("answer", weight=0.0)),
    "hard_kd": (objective("hard_kd"),),
    "teachers": (objective("teachers", teachers={"llama": ("TEACHER",)}, tau=2.0, tokens=2),),
    "entropy": (objective("entropy"), objective("answer")),
    "diversity": (objective("diversity", form="covariance"), objective("answer")),
    "sampled": (objective("sampled"),),
    "contrastive": (objective("contrastive"),),
    "reconstruct": (objective("reconstruct", width=16, heads=2),),
    "gist": (objective("gist", width=16, heads=2),),
    "window": (objective("select"), objective("window", before=2, width=16)),
    "align_readers": (objective("align_readers"),),
    "align_mean": (objective("align_mean"),),
    "semantic_anchor": (objective("semantic_anchor", source="ANCHOR"),),
}
RAMP = SCHEDULES.config("linear", start=0.0, end=1.0)


def config_of(name: str, *folders: Path, files: dict[str, Path]) -> RunConfig:
    """Two steps of an objective, at 6 bits."""
    objectives = tuple(
        o.map_sources(lambda source: str(files.get(source, source))) for o in OBJECTIVES_OF[name]
    )
    schedules = {"sampled.share": RAMP} if name == "sampled" else {}
    stage = StageConfig("s", steps=2, objectives=objectives, quantize=6, schedules=schedules)
    encoder = {"pooler": POOLERS.config("selected" if name == "window" else "spans")}
    return tiny_config(*folders, encoder=encoder, stages=(stage,))


@pytest.mark.parametrize("name", OBJECTIVES_OF)
def test_an_objective_is_trained_saved_loaded_and_resumed(
    name: str,
    llama_folder: Path,
    qwen_folder: Path,
    other_llama: Path,
    bert_folder: Path,
    tmp_path: Path,
) -> None:
    files = {"TEACHER": other_llama, "ANCHOR": bert_folder}
    config = config_of(name, llama_folder, qwen_folder, files=files)
    assert run_config_from_json(to_json(config)) == config
    whole = train(config, tmp_path / "whole")
    assert_resumes(config, tmp_path / "cut", whole)
    for record in records(tmp_path / "whole"):
        assert {key.split("/")[0] for key in record["losses"]} >= {
            o.kind for o in OBJECTIVES_OF[name]
        }
        assert record["grad_norm"] > 0
    model = Interlingua.from_pretrained(whole.folder.model)
    assert not model.heads, "no receiver needs them"
    latent = torch.randn(2, 4, 8)
    ours = whole.session.model.eval()
    for reader in ours.cards:
        assert torch.equal(model.prefix(reader, latent), ours.prefix(reader, latent))
    assert model.encode(["A b."]).equal(ours.encode(["A b."]))
