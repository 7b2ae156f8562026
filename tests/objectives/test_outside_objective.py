"""An objective from outside the package: registered, named in a file, trained with, reported."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch import Tensor

from latentwire_fast.config.base import require
from latentwire_fast.config.schema import ObjectiveConfig, RunConfig
from latentwire_fast.config.serialization import run_config_from_json, to_json
from latentwire_fast.errors import ConfigError
from latentwire_fast.objectives.base import Objective
from latentwire_fast.objectives.micro_batch import ReaderBatch
from latentwire_fast.objectives.prepared import PreparedItem
from latentwire_fast.readers.reader import Reader
from latentwire_fast.registry import OBJECTIVES
from runs import changed, deep, records, soft, tiny_config, train

pytestmark = pytest.mark.usefixtures("on_the_cpu")

SIZELESS = soft(expansion=1, dropout=0.1, calibration="none")


class Size(Objective):
    """Distance of the soft tokens' mean square from a number."""

    counted = "texts"

    @dataclass(frozen=True)
    class Config(ObjectiveConfig):
        """Settings: the number."""

        wanted: float = 1.0

        def check(self, run: RunConfig) -> None:
            require(run.gives("prefixes"), f"objective {self.kind!r} needs soft tokens")

    config: Config

    def prepare(self, prepared: PreparedItem, reader: Reader) -> int:
        return 1

    def compute(self, batch: ReaderBatch) -> Tensor:
        size_B = batch.inputs["prefixes"].pow(2).mean((1, 2))
        batch.report("size", size_B.detach().sum())
        return (size_B - self.config.wanted).abs().sum()


@pytest.fixture
def config(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.setattr(OBJECTIVES, "_added", {})
    OBJECTIVES.register("size", Size)
    data = to_json(tiny_config(llama_folder, attachments=(SIZELESS,)))
    data["stages"] = [
        {
            "name": "size",
            "steps": 2,
            "objectives": [{"kind": "size", "wanted": 2.0}, {"kind": "answer", "weight": 0.0}],
        }
    ]
    return run_config_from_json(data)


def test_it_trains_and_is_reported(config: RunConfig, tmp_path: Path) -> None:
    assert json.loads(json.dumps(to_json(config)))["stages"][0]["objectives"][0] == {
        "kind": "size",
        "weight": 1.0,
        "wanted": 2.0,
    }
    trainer = train(config, tmp_path)
    first, second = records(tmp_path)
    assert set(first["losses"]) == {"size/llama", "answer/llama"}
    assert first["loss"] == first["losses"]["size/llama"] > second["loss"]
    assert first["size"]["llama"] == pytest.approx(2.0 - first["loss"], abs=1e-5)
    assert set(first["accuracy"]) == {"llama"}
    assert (
        trainer.session.objectives.tokens(
            config.stages[0], {("size", "llama"): 7, ("answer", "llama"): 5}
        )
        == 5
    )  # texts are no tokens


def test_its_own_check_is_made(config: RunConfig) -> None:
    with pytest.raises(ConfigError, match="objective 'size' needs soft tokens"):
        changed(config, attachments=(deep(),))


def test_its_settings_are_nobodys_before_it_is_registered(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OBJECTIVES, "_added", {})
    with pytest.raises(ConfigError, match=r"Size\.Config is the Config of no registered objective"):
        Size.Config()
