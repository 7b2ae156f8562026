"""Own keys and values at chosen positions: all of them are the text, and a command prints them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import chosen_positions
from latentwire_fast.config.presets import weighted
from latentwire_fast.config.schema import StageConfig
from latentwire_fast.config.serialization import to_json
from latentwire_fast.data.examples import Example
from latentwire_fast.files.run_folder import RunFolder
from latentwire_fast.models.encoders.base import build_encoder
from latentwire_fast.readers.reader import Reader, load_readers
from latentwire_fast.registry import ENCODERS, POOLERS
from latentwire_fast.training.builders import build_model
from runs import deep, tiny_config

SELECTED = {"latents": 4, "d_z": 8, "pooler": POOLERS.config("selected"), "frozen": True}


@pytest.mark.parametrize("name", ["llama", "qwen"])
def test_all_positions_in_the_texts_place_are_the_text(
    readers: dict[str, Reader], examples: list[Example], name: str
) -> None:
    encoder = build_encoder(
        ENCODERS.config("lm", source=readers["llama"].source, **SELECTED),
        {"llama": readers["llama"]},
    ).eval()
    reader, example = readers[name], examples[0]
    with torch.no_grad():
        _, selection = encoder.select([example.context])
    everything = int(selection.scores_BT.isfinite().sum())
    found = chosen_positions.measure(encoder, reader, [example], [everything, 2])
    text = found.pop("the text")
    in_place = found[f"{everything} positions, in the text's place"]
    assert in_place["NLL per token"] == pytest.approx(text["NLL per token"], abs=2e-3)
    assert in_place["answers right"] == text["answers right"]
    assert len(found) == 4
    assert all(
        abs(row["NLL per token"] - text["NLL per token"]) > 1e-4 for row in list(found.values())[2:]
    )


def test_the_command_prints_a_line_for_each_way(
    llama_folder: Path, qwen_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(
        llama_folder,
        mode="context",
        encoder=SELECTED,
        attachments=(deep(width=16, heads=2),),
        stages=(StageConfig("match", steps=1, objectives=weighted(select=1.0, kv=1.0)),),
    )
    model = build_model(config, load_readers(config.readers, torch.device("cpu")))
    model.save_pretrained(RunFolder(tmp_path).model)
    RunFolder(tmp_path).config.write_text(json.dumps(to_json(config)))
    result = tmp_path / "found.json"
    arguments = [str(tmp_path), "--examples", "3", "--positions", "4", "--json", str(result)]
    assert chosen_positions.main(arguments) == 0
    ways = {"the text", "4 positions, before the prompt", "4 positions, in the text's place"}
    assert set(json.loads(result.read_text())["llama"]) == ways
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert chosen_positions.main([*arguments, "--reader", f"added={qwen_folder}"]) == 0
    assert {name: set(found) for name, found in json.loads(result.read_text()).items()} == {
        "added": ways
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "pure"}, "is of pure mode; give a run of context mode"),
        ({"mode": "context"}, "pooler 'spans' selects no positions"),
    ],
    ids=["pure mode", "no positions"],
)
def test_what_cannot_be_measured_is_one_line(
    llama_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, str],
    message: str,
) -> None:
    config = tiny_config(llama_folder, **changes)
    model = build_model(config, load_readers(config.readers, torch.device("cpu")))
    model.save_pretrained(RunFolder(tmp_path).model)
    RunFolder(tmp_path).config.write_text(json.dumps(to_json(config)))
    capsys.readouterr()  # what loading the readers wrote
    assert chosen_positions.main([str(tmp_path), "--examples", "2"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("chosen_positions: error: ")
    assert message in error
