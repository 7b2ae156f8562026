"""Stages in epochs, and stages that train on one piece of the run's data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from latentwire_fast.config.overrides import with_overrides
from latentwire_fast.config.presets import weighted
from latentwire_fast.config.schema import DataConfig, RunConfig, StageConfig
from latentwire_fast.config.serialization import run_config_from_json, to_json
from latentwire_fast.data.examples import Example
from latentwire_fast.data.streams import ExampleStream
from latentwire_fast.data.testbed import make_examples
from latentwire_fast.errors import ConfigError
from runs import (
    assert_resumes,
    records,
    squad_file,
    tiny_config,
    tiny_squad,
    train,
)

pytestmark = pytest.mark.usefixtures("on_the_cpu")


def config_of(folder: Path, source: str, *stages: StageConfig) -> RunConfig:
    """A tiny run on files."""
    return tiny_config(folder, data=DataConfig(source=source, eval_examples=1), stages=stages)


def stage(name: str, **options: Any) -> StageConfig:
    """A stage of answers."""
    return StageConfig(name, objectives=weighted(answer=1.0), **options)


def test_an_epoch_is_one_pass_over_the_data(llama_folder: Path, tmp_path: Path) -> None:
    """And a run in epochs goes on to the bit, from a configuration that says epochs."""
    source = str(tiny_squad(tmp_path / "data.json"))
    config = config_of(llama_folder, source, stage("a", epochs=1.5), stage("b", steps=1))
    assert run_config_from_json(to_json(config)) == config
    whole = train(config, tmp_path / "whole")
    items = whole.session.stream.items  # type: ignore[attr-defined]
    steps = -(-3 * len(items) // (2 * config.optim.batch_size))
    assert [s.steps for s in whole.session.config.stages] == [steps, 1]
    assert len(records(tmp_path / "whole")) == steps + 1
    stored = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert (stored["stages"][0]["epochs"], stored["stages"][0]["steps"]) == (1.5, 0)
    assert_resumes(config, tmp_path / "cut", whole, match=f"after step 1 of {steps + 1}")


def test_an_epoch_of_a_mixture_counts_its_questions() -> None:
    questions = [Example(str(i), f"context {i}", "What?", ("this",)) for i in range(12)]
    texts = [Example(f"t{i}", f"text {i}", "", ()) for i in range(4)]
    data = DataConfig(text_share=0.5)
    stream = ExampleStream(questions + texts, data, mode="context", seed=0)
    assert stream.epoch_steps(4) == 3
    assert stream.epoch_steps(4, texts=True) == 6
    assert ExampleStream(texts, data, mode="context", seed=0).epoch_steps(2, texts=True) == 2


def test_a_stage_trains_on_its_piece_of_the_data(llama_folder: Path, tmp_path: Path) -> None:
    first = str(tiny_squad(tmp_path / "first.json"))
    second = str(squad_file(make_examples(9, seed=8, facts=1), tmp_path / "second.json"))
    config = config_of(
        llama_folder,
        f"{first}+{second}",
        stage("one", steps=1, source=second),
        stage("all", steps=1),
    )
    session = train(config, tmp_path / "run").session
    one, both = (session.data.stream_of(s) for s in session.config.stages)
    assert isinstance(one, ExampleStream)
    assert isinstance(both, ExampleStream)
    contexts = {item.context for item in one.items}
    everything = {item.context for item in both.items}
    assert contexts < everything
    assert contexts <= {e.context for e in make_examples(9, seed=8, facts=1)}


def test_what_cannot_be_is_named(llama_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"epochs=2.0 and steps=3; give one of them"):
        stage("a", epochs=2.0, steps=3)
    with pytest.raises(ConfigError, match="steps=0, expected at least 1"):
        stage("a")
    with pytest.raises(ConfigError, match=r"epochs=0.0, expected above 0"):
        stage("a", epochs=0.0)
    endless = config_of(llama_folder, "testbed", stage("a", epochs=1.0))
    with pytest.raises(ConfigError, match=r"epochs=1.0, and testbed has no end; give steps"):
        train(endless, tmp_path / "endless")
    with pytest.raises(ConfigError, match=r"stage 'a' is as long as its epochs=1.0"):
        with_overrides(endless, steps=5)
    other = replace(endless, stages=(stage("a", steps=1, source="squad.json"),))
    with pytest.raises(ConfigError, match=r"source='squad.json' is none of the pieces of data"):
        train(other, tmp_path / "other")
