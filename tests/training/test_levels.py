"""Numbers that change over the steps of a stage, parts that it freezes, readers that it trains."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from latentwire_fast.config.presets import weighted
from latentwire_fast.config.schema import RunConfig, ScheduleConfig, StageConfig
from latentwire_fast.config.serialization import run_config_from_json, to_json
from latentwire_fast.errors import ConfigError
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.registry import OBJECTIVES, SCHEDULES
from latentwire_fast.training.levels import Gates
from latentwire_fast.training.trainer import Trainer
from runs import (
    assert_resumes,
    changed,
    deep,
    records,
    soft,
    tiny_config,
    train,
)

pytestmark = pytest.mark.usefixtures("on_the_cpu")


def ramp(start: float, end: float, **options: Any) -> ScheduleConfig:
    """A straight line."""
    return SCHEDULES.config("linear", start=start, end=end, **options)


def staged(*folders: Path, steps: int = 4, **changes: Any) -> RunConfig:
    """A run of one stage of answers and distillation."""
    stage = StageConfig("s", steps=steps, objectives=weighted(answer=1.0, kd=0.5))
    return tiny_config(*folders, stages=(replace(stage, **changes),))


def scheduled() -> dict[str, ScheduleConfig]:
    """A schedule at every place; the gated one opens at once and goes on slowly."""
    return {
        "gain": ramp(2.0, 1.0, until_share=0.75),
        "latent_dropout": ramp(0.5, 0.0),
        "kd.weight": SCHEDULES.config("cosine", start=0.0, end=1.0),
        "answer.tokens": SCHEDULES.config("gated", gate=1e-6, start=1.0, end=3.0, rise=2),
    }


def test_levels_change_over_a_stage_and_resume_to_the_bit(
    llama_folder: Path, tmp_path: Path
) -> None:
    config = staged(llama_folder, schedules=scheduled(), quantize=6)
    assert run_config_from_json(to_json(config)) == config
    whole = train(config, tmp_path / "whole")
    found = [record["levels"] for record in records(tmp_path / "whole")]
    assert [level["gain"] for level in found] == pytest.approx([2.0, 5 / 3, 4 / 3, 1.0])
    assert [level["latent_dropout"] for level in found] == [0.5, 0.375, 0.25, 0.125]
    assert found[0]["kd.weight"] == 0.0
    assert whole.session.state.gates.accuracy is not None
    assert_resumes(config, tmp_path / "cut", whole)
    model = Interlingua.from_pretrained(whole.folder.model)
    assert model.fingerprint == whole.session.model.fingerprint


def test_a_gate_goes_by_the_running_accuracy() -> None:
    schedules = {"answer.tokens": SCHEDULES.config("gated", gate=0.5, start=1.0, end=3.0, rise=2)}
    stage = StageConfig("s", steps=9, objectives=weighted(answer=1.0), schedules=schedules)
    gates = Gates()
    found = []
    for accuracy in (1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0):
        found.append(gates.levels(stage, 0)["answer.tokens"])
        gates.watch(stage, {"accuracy/a": torch.tensor(accuracy)})
    assert found == [1.0, 2.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0]
    again = Gates()
    again.state = gates.state
    assert again == gates
    gates.watch(stage, {"accuracy/a": torch.tensor(0.0)})
    assert gates.levels(stage, 0)["answer.tokens"] == 2.0
    gates.watch(stage, {})  # texts without questions say nothing
    assert gates.levels(stage, 0)["answer.tokens"] == 2.0


def test_a_level_is_what_it_stands_for(llama_folder: Path, tmp_path: Path) -> None:
    """A constant schedule trains as the setting does."""
    schedules = {
        "answer.tokens": SCHEDULES.config("constant", level=2.0),
        "kd.weight": SCHEDULES.config("constant", level=0.25),
    }
    found = train(staged(llama_folder, steps=2, schedules=schedules), tmp_path / "scheduled")
    objectives = (
        OBJECTIVES.config("answer", tokens=2),
        OBJECTIVES.config("kd", weight=0.25),
    )
    wanted = train(staged(llama_folder, steps=2, objectives=objectives), tmp_path / "set")
    pairs = zip(found.session.state.named, wanted.session.state.named, strict=True)
    assert all(torch.equal(a, b) for (_, a), (_, b) in pairs)


def test_latents_that_are_dropped_are_zeros(llama_folder: Path, tmp_path: Path) -> None:
    schedules = {"latent_dropout": SCHEDULES.config("constant", level=0.5)}
    trainer = train(staged(llama_folder, steps=1, schedules=schedules), tmp_path)
    session = trainer.session
    stage = session.config.stages[0]
    batch = session.stream.batch(0, 4, facts=2)
    items = session.objectives.prepare(batch, stage, ["llama"])
    seen = []
    session.model.attachments["llama"]["soft"].register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0])
    )
    counts = dict.fromkeys(items[0].counts, 1)
    session.objectives.compute(items, stage, counts)
    dropped = (seen[0] == 0).all(-1).float().mean().item()
    assert 0 < dropped < 1


def test_batches_of_texts_are_counted_where_their_share_is_scheduled() -> None:
    stage = StageConfig(
        "s",
        steps=8,
        objectives=weighted(answer=1.0, autoencode=1.0),
        schedules={"text_share": ramp(0, 1, from_share=0.25, until_share=0.75)},
    )
    gates = Gates()
    counted = [gates.text_batches(stage, done) or (0, 0) for done in range(8)]
    assert [after - before for before, after in counted] == [0, 0, 0, 0, 0, 1, 1, 1]
    assert [before for before, _ in counted[1:]] == [after for _, after in counted[:-1]]
    assert gates.text_batches(replace(stage, schedules={}), 0) is None


def test_dropout_is_that_of_the_schedule(llama_folder: Path, tmp_path: Path) -> None:
    """In the place of the adapter's own 0.1, which comes back in the next stage."""
    schedules = {"dropout": ramp(0.5, 0.0)}
    first = replace(staged(llama_folder, steps=2, schedules=schedules).stages[0], name="first")
    second = replace(first, name="second", steps=1, schedules={})
    config = changed(
        tiny_config(llama_folder, stages=(first, second)),
        attachments=(soft("mlp", dropout=0.1), deep(width=16, layers=1, heads=2)),
    )
    trainer = Trainer(config, tmp_path, progress=False)
    step, seen = trainer._train_step, []

    def watched() -> Any:
        found = step()
        parts = list(trainer.session.model.attachments.modules())
        rates = {part.p for part in parts if isinstance(part, torch.nn.Dropout)}
        rates |= {part.dropout for part in parts if isinstance(part, torch.nn.MultiheadAttention)}
        seen.append(sorted(rates))
        return found

    trainer._train_step = watched
    trainer.run()
    assert seen == [[0.5], [0.25], [0.0, 0.1]]
    core = trainer.session.model.encoder.core
    assert all(part.p == 0 for part in core.modules() if isinstance(part, torch.nn.Dropout))


def test_frozen_parts_stay(llama_folder: Path, qwen_folder: Path, tmp_path: Path) -> None:
    first = StageConfig("first", steps=1, objectives=weighted(answer=1.0))
    second = replace(first, name="second", frozen=("encoder", "attachments.llama.soft.adapter"))
    runs = []
    for number, stages in enumerate(((first,), (first, second))):
        config = tiny_config(llama_folder, qwen_folder, stages=stages)
        runs.append(dict(train(config, tmp_path / str(number)).session.state.named))
    same = {name for name in runs[0] if torch.equal(runs[0][name], runs[1][name])}
    assert {name for name in runs[0] if name.startswith("encoder.")} <= same
    assert {n for n in runs[0] if n.startswith("attachments.llama.soft.adapter.")} <= same
    assert "attachments.llama.soft.weight" in runs[0].keys() - same
    assert "attachments.qwen2.soft.adapter.up.weight" in runs[0].keys() - same


def test_a_stage_trains_the_readers_that_it_names(
    llama_folder: Path, qwen_folder: Path, tmp_path: Path
) -> None:
    stage = StageConfig("one", steps=1, objectives=weighted(answer=1.0), readers=("qwen2",))
    config = tiny_config(llama_folder, qwen_folder, stages=(stage,))
    train(config, tmp_path)
    (record,) = records(tmp_path)
    assert set(record["losses"]) == {"answer/qwen2"}
    assert record["grad_norms"]["llama"] == 0.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"schedules": {"kd.wait": ramp(0, 1)}},
            r"expected gain, latent_dropout, dropout, text_share, or one of answer",
        ),
        ({"schedules": {"dropout": ramp(0, 1)}, "steps": 200}, None),
        ({"schedules": {"dropout": ramp(1, 0)}}, r"1, expected in \[0, 1\)"),
        ({"schedules": {"text_share": ramp(0, 1)}}, "for stages that learn from texts"),
        (
            {
                "objectives": weighted(answer=1.0, autoencode=1.0),
                "schedules": {"text_share": ramp(0, 2)},
            },
            "expected 0 to 1",
        ),
        ({"schedules": {"embed.weight": ramp(0, 1)}}, r"schedules\['embed.weight'\]: expected"),
        ({"schedules": {"latent_dropout": ramp(0, 1)}, "steps": 2}, None),
        ({"schedules": {"latent_dropout": ramp(1, 0)}}, r"1, expected in \[0, 1\)"),
        ({"schedules": {"gain": ramp(0, 1)}}, "0.0, expected above 0"),
        ({"schedules": {"answer.tokens": ramp(0, 1)}}, "tokens=0, expected at least 1"),
        ({"schedules": {"gain": ramp(1, 2)}}, "ends at 2, and a receiver applies 1"),
        (
            {"objectives": weighted(answer=1.0), "schedules": {"answer.weight": ramp(0, 1)}},
            "no objective has a weight above 0 at step 0",
        ),
        ({"readers": ("gemma",)}, r"readers=\['gemma'\], this run has \['llama'\]"),
        ({"facts": SCHEDULES.config("gated", start=1.0)}, "facts: 'gated' goes by the accuracy"),
        (
            {"objectives": weighted(kd=1.0), "schedules": {"kd.weight": SCHEDULES.config("gated")}},
            "no objective of the stage reports one; add answer",
        ),
    ],
)
def test_schedules_are_checked(
    llama_folder: Path, changes: dict[str, Any], message: str | None
) -> None:
    if message is None:
        staged(llama_folder, **changes)
        return
    with pytest.raises(ConfigError, match=message):
        staged(llama_folder, **changes)


@pytest.mark.parametrize(
    ("frozen", "message"),
    [
        (
            ("encodr",),
            "frozen='encodr' is no trained part of this run; there are attachments.llama",
        ),
        (
            ("encoder", "attachments", "task_tokens"),
            "everything is frozen; leave out one of encoder, attachments, task_tokens",
        ),
    ],
)
def test_frozen_parts_are_checked(
    llama_folder: Path, tmp_path: Path, frozen: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(staged(llama_folder, frozen=frozen), tmp_path)


def test_learning_rates_know_no_accuracy(llama_folder: Path) -> None:
    config = staged(llama_folder)
    with pytest.raises(ConfigError, match="lr_schedule: 'gated' goes by the accuracy"):
        replace(config, optim=replace(config.optim, lr_schedule=SCHEDULES.config("gated")))


@pytest.mark.parametrize("readers", ["sum", "sequential"])
def test_a_step_without_any_weight_trains_nothing(
    llama_folder: Path, tmp_path: Path, readers: str
) -> None:
    gate = SCHEDULES.config("gated", gate=1.0, start=0.0)
    config = changed(
        staged(
            llama_folder,
            steps=2,
            objectives=weighted(answer=1.0),
            schedules={"answer.weight": gate},
        ),
        optim={"readers": readers},
    )
    train(config, tmp_path)
    assert [record["loss"] for record in records(tmp_path)] == [0.0, 0.0]
    assert [record["grad_norm"] for record in records(tmp_path)] == [0.0, 0.0]
