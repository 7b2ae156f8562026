"""Stages with their own number of latents, and the hand-over between them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from latentwire_fast.config.schema import RunConfig, StageConfig, ValidationConfig
from latentwire_fast.config.serialization import run_config_from_json, to_json
from latentwire_fast.errors import CheckpointError, ConfigError, RunStopped
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.registry import POOLERS
from latentwire_fast.training.hand_over import hand_over
from latentwire_fast.training.trainer import Trainer
from runs import assert_same_run, changed, deep, new_process, records, soft, tiny_config, train

pytestmark = pytest.mark.usefixtures("on_the_cpu")

# Everything here has an entry for each latent: the pooler's queries, film's scales, the slots.
PARTS = {
    "encoder": {"pooler": POOLERS.config("queries"), "latents": 2},
    "attachments": (soft("film"), deep(width=16, layers=1, heads=2)),
}


def curriculum(*folders: Path, **changes: Any) -> RunConfig:
    """Four latents for two steps, three for one, two for two."""
    stages = (
        StageConfig("four", steps=2, latents=4),
        StageConfig("three", steps=1, latents=3, hand_over="mean"),
        StageConfig("two", steps=2),
    )
    return changed(tiny_config(*folders), stages=stages, **PARTS, save_every=1, **changes)


def stopped(config: RunConfig, folder: Path, *, step: int) -> None:
    """Train until so many steps are done."""
    new_process(step)
    trainer = Trainer(config, folder, progress=False)
    advance = trainer._train_step

    def count() -> Any:
        if trainer.session.state.step + 1 == step:
            trainer.signals.number = 15
        return advance()

    trainer._train_step = count  # type: ignore[method-assign]
    with pytest.raises(RunStopped):
        trainer.run()


def test_a_run_hands_over_to_fewer_latents_and_resumes_to_the_bit(
    llama_folder: Path, tmp_path: Path
) -> None:
    config = curriculum(llama_folder)
    assert run_config_from_json(to_json(config)) == config
    whole = train(config, tmp_path / "whole")
    names = [record["stage"] for record in records(tmp_path / "whole")]
    assert names == ["four", "four", "three", "two", "two"]
    model = Interlingua.from_pretrained(whole.folder.model)
    assert model.encoder_config.latents == 2
    assert len(model.decode_payloads(model.encode_payloads(["Bakrim is 9."]))[0]) == 2
    for step in (2, 3):  # at both hand-overs
        stopped(config, tmp_path / str(step), step=step)
        assert_same_run(train(config, tmp_path / str(step), process=step), whole)


def test_what_is_handed_over_trains_on(llama_folder: Path, tmp_path: Path) -> None:
    """Behind a hand-over the slots that are kept have what they had."""
    config = curriculum(llama_folder)
    four = replace(config.stages[0], steps=1, lr=1e-9)
    stages = (four, replace(config.stages[-1], steps=1, lr=1e-9))
    session = train(replace(config, stages=stages), tmp_path / "run").session
    alone = changed(config, stages=(replace(four, latents=None),), encoder={"latents": 4})
    fresh = train(alone, tmp_path / "fresh").session
    kept, before = dict(session.state.named), dict(fresh.state.named)
    slots = kept["attachments.llama.deep.slots"]
    assert len(slots) == 2
    torch.testing.assert_close(slots, before["attachments.llama.deep.slots"][:2])
    torch.testing.assert_close(kept["encoder.project.weight"], before["encoder.project.weight"])


def test_slots_are_kept_or_averaged() -> None:
    saved = {"a": torch.arange(8.0).view(4, 2), "b": torch.arange(4), "c": torch.ones(3)}
    own = {"a": torch.zeros(2, 2), "b": torch.zeros(2, dtype=torch.long), "c": torch.zeros(3)}
    first = hand_over(saved, own, "first")
    assert first["a"].tolist() == [[0, 1], [2, 3]]
    assert first["c"] is saved["c"]
    mean = hand_over(saved, own, "mean")
    assert mean["a"].tolist() == [[1, 2], [5, 6]]
    assert mean["b"].dtype == torch.long
    for wrong in ({"a": torch.zeros(4, 3)}, {}, {"a": torch.zeros(4, 3, 1)}):
        with pytest.raises(CheckpointError, match="cannot be handed over"):
            hand_over(wrong, {"a": own["a"]}, "first")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stages": ("rise", 3)}, "latents=3 behind 2; they may only become fewer"),
        ({"stages": ("last", 4)}, "the model ends with encoder.latents=2"),
        ({"validation": ValidationConfig(use_best=True)}, "with use_best or patience"),
        ({"validation": ValidationConfig(patience=2)}, "with use_best or patience"),
        ({"stages": ("none", 0)}, "stage 'none': latents=0, expected 1 to 65535, or none"),
        ({"stages": ("even", 2, "mean")}, "stage 'even': hand_over='mean' is for a stage with few"),
    ],
)
def test_a_curriculum_that_cannot_be_is_refused(
    llama_folder: Path, changes: dict[str, Any], words: str
) -> None:
    config = curriculum(llama_folder)
    if "stages" in changes:
        where, count, *how = changes["stages"]
        first, _, last = config.stages

    def wrong() -> RunConfig:
        if "stages" not in changes:
            return replace(config, **changes)
        behind = StageConfig(where, steps=2, latents=count, hand_over=(how or ["first"])[0])
        return replace(config, stages=(first, behind) if where == "last" else (first, last, behind))

    with pytest.raises(ConfigError, match=words):
        wrong()
