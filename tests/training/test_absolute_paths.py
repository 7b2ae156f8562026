"""Relative paths given for a run: it is resumed and evaluated from any working directory."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from latentwire_fast.config.schema import (
    DataConfig,
    ReaderConfig,
    RunConfig,
    StageConfig,
)
from latentwire_fast.data.source_names import map_paths
from latentwire_fast.data.testbed import make_examples
from latentwire_fast.errors import ConfigError, DataError
from latentwire_fast.evaluation.pipeline import evaluate_run
from latentwire_fast.registry import ENCODERS
from latentwire_fast.training.builders import absolute_paths
from latentwire_fast.training.trainer import Trainer
from runs import changed, contents, squad_file, tiny_config, train

pytestmark = pytest.mark.usefixtures("on_the_cpu")


def config_of(source: str, data: str = "testbed") -> RunConfig:
    return RunConfig(
        readers={"one": ReaderConfig(source)},
        encoder=ENCODERS.config("lm", source=source),
        data=DataConfig(source=data),
        stages=(StageConfig("answer", steps=1),),
    )


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model's folder and a few files."""
    for folder in ("models/llama", "org/name", "testbed", "a=b"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("squad.json", "rows.jsonl", "a=b/squad.json"):
        (tmp_path / file).write_text("[]")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("source", "stays"),
    [
        ("models/llama", False),
        ("./models/../models/llama/", False),
        ("org/name", False),  # a folder of that name comes before the hub's
        ("org/other", True),
        ("testbed:llama", True),
        ("models/nobody", True),
        ("/models/nobody", True),
    ],
)
def test_models(here: Path, source: str, stays: bool) -> None:
    config = absolute_paths(config_of(source))
    expected = source if stays else str((here / source).resolve())
    assert config.readers["one"].source == config.encoder.source == expected
    assert absolute_paths(config) == config


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("testbed", "testbed"),
        ("squad.json", "{here}/squad.json"),
        ("a=b/squad.json", "{here}/a=b/squad.json"),
        ("squad_v2=rows.jsonl", "squad_v2={here}/rows.jsonl"),
        ("hub:squad", "hub:squad"),
        ("squad.json, hub:mmlu,", "{here}/squad.json,hub:mmlu"),
        ("nowhere.json", "nowhere.json"),
        ("squad=nowhere", "squad=nowhere"),
        ("", ""),
    ],
)
def test_data(here: Path, source: str, expected: str) -> None:
    config = absolute_paths(config_of("testbed:llama", source))
    assert config.data.source == expected.format(here=here)
    assert absolute_paths(config) == config


def test_a_link_keeps_its_name(here: Path) -> None:
    (here / "current").symlink_to(here / "models" / "llama")
    assert absolute_paths(config_of("current")).encoder.source == str(here / "current")


def test_a_comma_in_the_way_is_refused() -> None:
    with pytest.raises(DataError, match=r"'/a,b/squad.json': a comma separates sources"):
        map_paths("squad.json", lambda path: f"/a,b/{path}")


@pytest.fixture
def relative(
    here: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, RunConfig]:
    """A working directory, and a run of one step with everything given relative to it."""
    squad_file(make_examples(40, seed=5, facts=1), here / "squad.json")
    reader = Path(os.path.relpath(llama_folder, here))
    config = tiny_config(reader, data={"source": "squad.json", "eval_examples": 2})
    return here, changed(config, stages=(StageConfig("answer", steps=1),))


def test_a_run_is_found_from_another_directory(
    relative: tuple[Path, RunConfig],
    tmp_path_factory: pytest.TempPathFactory,
    llama_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here, config = relative
    run_dir = here / "run"
    train(config, run_dir)
    stored = json.loads((run_dir / "config.json").read_text())
    assert stored["data"]["source"] == str(here / "squad.json")
    assert stored["encoder"]["source"] == str(llama_folder)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    squad_file(make_examples(3, seed=6, facts=1), elsewhere / "squad.json")
    monkeypatch.chdir(elsewhere)
    assert evaluate_run(run_dir, progress=False)["examples"] == 2
    with pytest.raises(ConfigError, match="differs in data"):  # a file of the same name
        train(config, run_dir)


def test_the_same_command_resumes_a_run_that_stored_relative_paths(
    relative: tuple[Path, RunConfig],
) -> None:
    """As earlier versions did; and an absolute path means the same as a relative one."""
    here, config = relative
    run_dir = here / "run"
    trainer = train(config, run_dir)
    absolute = (run_dir / "config.json").read_text()
    (run_dir / "config.json").write_text(absolute.replace(f"{here}/squad.json", "squad.json"))
    before = contents(run_dir)
    Trainer(config, run_dir, progress=False).run()
    Trainer(trainer.config, run_dir, progress=False).run()
    assert contents(run_dir) == before
