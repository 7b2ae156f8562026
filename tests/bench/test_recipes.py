"""The comparison of recipes: the same run but for what it learns from, and a table of what came."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench.real import recipes

pytestmark = pytest.mark.usefixtures("on_the_cpu")


@pytest.mark.parametrize("testbed", [True, False])
def test_recipes_differ_in_what_they_learn_from(tmp_path: Path, testbed: bool) -> None:
    args = recipes.parse([str(tmp_path), "--steps", "120", *(["--testbed"] if testbed else [])])
    configs = {name: recipes.config_of(name, seed=3, args=args) for name in recipes.RECIPES}
    first = configs["answer"]
    for name, config in configs.items():
        assert config.total_steps == 120, name
        assert config.seed == 3
        same = replace(first, preset=config.preset, encoder=config.encoder, stages=config.stages)
        assert config == same
        shape = (config.encoder.latents, config.encoder.d_z)
        assert shape == (first.encoder.latents, first.encoder.d_z)
    assert len({config.stages for config in configs.values()}) == len(configs)


def test_a_recipe_is_run_once_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["encoder.latents=4", "encoder.d_z=8", "optim.batch_size=2", "data.facts=1"]
    small += ["evaluation.timing_examples=1", "evaluation.bits=[6]", "evaluation.max_new_tokens=2"]
    given = [str(tmp_path), "--testbed", "--recipes", "answer", "--steps", "1", "--examples", "2"]
    given += [word for setting in small for word in ("--set", setting)]
    assert recipes.main(given) == 0
    (row,) = json.loads((tmp_path / "recipes.json").read_text())
    assert (row["recipe"], row["seed"], row["steps"]) == ("answer", 0, 1)
    assert set(row["nll"]["llama"]) == set(recipes.METHODS)
    assert "| answer | 0 |" in capsys.readouterr().out
    before = (tmp_path / "answer-seed0" / "diagnostics.jsonl").read_text()
    assert recipes.main(given) == 0  # from its folder
    assert (tmp_path / "answer-seed0" / "diagnostics.jsonl").read_text() == before


def test_data_that_is_not_there_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(tmp_path), "--testbed", "--data", "absent.json", "--recipes", "answer"]
    assert recipes.main(given) == 2
    assert "absent.json" in capsys.readouterr().err
