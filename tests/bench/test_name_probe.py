"""The probe of names: it finds a syllable that is in the latents, and none that is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import name_probe
from latentwire_fast.config.presets import weighted
from latentwire_fast.config.schema import StageConfig
from latentwire_fast.config.serialization import to_json
from latentwire_fast.data.testbed import SYLLABLES
from latentwire_fast.files.run_folder import RunFolder
from latentwire_fast.models.encoders.base import Encoder
from latentwire_fast.models.poolers.base import Selection
from latentwire_fast.readers.reader import load_readers
from latentwire_fast.registry import POOLERS
from latentwire_fast.training.builders import build_model
from runs import deep, tiny_config

SELECTED = {"latents": 4, "d_z": 8, "pooler": POOLERS.config("selected"), "frozen": True}


def saved_run(folder: Path, reader: Path, **changes: object) -> Path:
    settings = {
        "mode": "context",
        "encoder": SELECTED,
        "attachments": (deep(width=16, heads=2),),
        "stages": (StageConfig("match", steps=1, objectives=weighted(select=1.0, kv=1.0)),),
    }
    config = tiny_config(reader, **settings | changes)
    model = build_model(config, load_readers(config.readers, torch.device("cpu")))
    model.save_pretrained(RunFolder(folder).model)
    RunFolder(folder).config.write_text(json.dumps(to_json(config)))
    return folder


class Sentences:
    """Stands for an encoder with a latent at the end of each of two sentences, of these values."""

    def __init__(self, latent_Md: Tensor) -> None:
        self.latent_Md = latent_Md

    def text_ends(self, context: str) -> list[int]:
        label = len("Context: ")
        return [label + i + 1 for i, character in enumerate(context) if character == "."]

    def select(self, contexts: list[str]) -> tuple[Tensor, Selection]:
        places = torch.tensor([[0, 1]] * len(contexts))
        latent = self.latent_Md.expand(len(contexts), -1, -1)
        return latent, Selection(torch.zeros(len(contexts), 2), places, latent)


def test_latents_are_of_the_person_in_their_sentence() -> None:
    """The person is the first name: Dennul is a dog, and People nobody."""
    encoder: Encoder = Sentences(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))  # type: ignore[assignment]
    text = "The faithful dog of Norvun is named Dennul. People in town know Busden as a baker."
    rows, syllables = name_probe.facts(encoder, [text])
    assert rows.tolist() == [[1, 2, 1, 2], [3, 4, 3, 4]]
    assert [[SYLLABLES[i] for i in pair] for pair in syllables.tolist()] == [
        ["nor", "vun"],
        ["bus", "den"],
    ]


def test_a_syllable_is_found_where_it_is() -> None:
    torch.manual_seed(3)
    labels = torch.randint(len(SYLLABLES), (3000,))
    rows = torch.randn(len(SYLLABLES), 16)[labels] + 0.1 * torch.randn(3000, 16)
    other = torch.randint(len(SYLLABLES), (3000,))
    for wanted, low, high in ((labels, 95, 100), (other, 0, 6)):
        parts = ((rows[:2000], wanted[:2000]), (rows[2000:], wanted[2000:]))
        assert low <= name_probe.probe(*parts) <= high


def test_the_command_prints_a_line_for_each_run(
    llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, result = saved_run(tmp_path, llama_folder), tmp_path / "found.json"
    arguments = [str(run), "--passages", "20", "--examples", "6", "--json", str(result)]
    assert name_probe.main(arguments) == 0
    found = json.loads(result.read_text())[str(run)]
    assert all(0 <= found[half] <= 100 for half in ("first", "second"))
    assert f"{run}: first syllable {found['first']:.1f}%, second" in capsys.readouterr().out


def test_a_run_without_positions_is_refused(
    llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"encoder": {"pooler": POOLERS.config("spans")}, "attachments": (deep(),)}
    stages = (StageConfig("answer", steps=1),)
    run = saved_run(tmp_path, llama_folder, stages=stages, **changes)
    capsys.readouterr()
    assert name_probe.main([str(run)]) == 2
    assert "selects no positions" in capsys.readouterr().err
