"""Keys and values at positions of the reader's own: which they are, and the distance to them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from latentwire_fast.config.presets import weighted
from latentwire_fast.config.schema import StageConfig
from latentwire_fast.data.streams import TestbedStream
from latentwire_fast.errors import ConfigError
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.objectives.objective_set import ObjectiveSet
from latentwire_fast.objectives.prepared import total_counts
from latentwire_fast.prompts.builder import full_text
from latentwire_fast.readers.reader import Reader, load_readers
from latentwire_fast.readers.trace import observe
from latentwire_fast.training.builders import build_model
from runs import deep, soft, tiny_config

STAGE = StageConfig("own", steps=1, objectives=weighted(own_kv=1.0))
LENGTHS = pytest.mark.parametrize("length", [None, 7, 300], ids=["latents", "7", "longer than any"])


@pytest.fixture(params=["context", "pure"])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def build(
    mode: str, length: int | None, *folders: Path
) -> tuple[Interlingua, ObjectiveSet, list[Any]]:
    """A model without chosen positions, and five items of it."""
    prefix = deep(width=16, heads=2, expansion=1, length=length)
    config = tiny_config(*folders, mode=mode, attachments=(prefix,), stages=(STAGE,))
    readers = load_readers(config.readers)
    torch.manual_seed(3)
    model = build_model(config, readers)
    items = TestbedStream(config.data, mode=config.mode, seed=7).batch(0, 5, facts=2)
    return model, ObjectiveSet(model, readers), items


def own_keys_values(reader: Reader, mode: str, items: list[Any], length: int) -> Tensor:
    """What a prefix of so many positions is to hold, computed text by text."""
    start = reader.prompts.content_start
    found = []
    for item in items:
        prompt = reader.prompts.build(item.turns, context=item.context)
        observation = observe(reader, [prompt])
        context = len(reader.prompts.text_ids(f"Context: {item.context}"))
        whole = len(reader.prompts.text_ids(full_text(item.context, item.turns[0].question)))
        count = whole if mode == "pure" else context
        attention = observation.attention_BT[0, start : start + count].tolist()
        best = sorted(range(count), key=lambda place: -attention[place])[:length]
        places = sorted(best) + [count - 1] * (length - len(best))
        found.append(observation.keys_values(start + torch.tensor([places])))
    return torch.cat(found, 2)


@LENGTHS
def test_it_is_the_squared_error_at_what_the_answers_attend_to(
    mode: str,
    length: int | None,
    llama_folder: Path,
    qwen_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A prefix that is half of what the reader holds is off by a quarter of its mean square."""
    model, objectives, items = build(mode, length, llama_folder, qwen_folder)
    for name, reader in objectives.readers.items():
        target = own_keys_values(reader, mode, items, length or model.encoder_config.latents)
        monkeypatch.setattr(model, "deep_prefix", lambda *_, half=0.5 * target, **__: half)
        rms = torch.tensor(model.cards[name].kv.rms)
        wanted = (0.25 * target.pow(2).mean((2, 3, 4, 5)) / rms.pow(2)).mean().item() * len(items)
        prepared = objectives.prepare(items, STAGE, [name])
        found = objectives.compute(prepared, STAGE, total_counts(prepared)).sums["own_kv", name]
        assert found.item() == pytest.approx(wanted, rel=1e-4)


def test_a_few_steps_come_closer(mode: str, llama_folder: Path) -> None:
    model, objectives, items = build(mode, 7, llama_folder)
    prepared = objectives.prepare(items, STAGE, ["llama"])
    optimizer = torch.optim.Adam([p for _, p in model.trained_parameters()], lr=3e-3)
    values = []
    for _ in range(30):
        optimizer.zero_grad()
        losses = objectives.compute(prepared, STAGE, total_counts(prepared))
        losses.total.backward()
        optimizer.step()
        values.append(losses.total.item())
    assert values[-1] < 0.9 * values[0]


def test_it_teaches_a_reader_that_is_added(llama_folder: Path, qwen_folder: Path) -> None:
    """Unlike `select`, it is the reader's business and not the encoder's."""
    attachments = (deep(width=16, heads=2, expansion=1, length=7),)
    config = tiny_config(llama_folder, attachments=attachments, stages=(STAGE,))
    assert replace(config, base="runs/a").stages == (STAGE,)


def test_it_needs_a_deep_prefix(llama_folder: Path) -> None:
    with pytest.raises(ConfigError, match="objective 'own_kv' needs an attachment 'deep'"):
        tiny_config(llama_folder, attachments=(soft(),), stages=(STAGE,))
