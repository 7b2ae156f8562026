"""Readers one after the other: the gradients of their sum, with one reader's graph at a time."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import runs
from latentwire_fast.config.presets import weighted
from latentwire_fast.config.schema import RunConfig, StageConfig
from latentwire_fast.data.streams import TestbedStream, TrainItem
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.objectives.objective_set import Losses, ObjectiveSet
from latentwire_fast.objectives.prepared import total_counts
from latentwire_fast.readers.reader import Reader, load_readers
from latentwire_fast.registry import BOTTLENECKS, POOLERS
from latentwire_fast.training.builders import build_model
from runs import tiny_config

SOFT = StageConfig(
    "soft",
    steps=1,
    objectives=weighted(answer=1.0, kd=0.5, autoencode=0.2, continuation=0.8, embed=0.3),
)
DEEP = StageConfig(
    "deep", steps=1, objectives=weighted(select=1.0, kv=0.7, answer=1.0, kd=0.5, continuation=0.8)
)


@dataclass
class Setting:
    """A fresh model, its frozen readers, and a ragged batch of five items."""

    model: Interlingua
    readers: dict[str, Reader]
    items: list[TrainItem]

    @classmethod
    def of(cls, config: RunConfig) -> Setting:
        readers = load_readers(config.readers)
        torch.manual_seed(3)
        model = build_model(config, readers)
        stream = TestbedStream(config.data, mode=config.mode, seed=7)
        items = [item for facts in (1, 2, 4) for item in stream.batch(facts, 2, facts=facts)]
        return cls(model, readers, items[:5])

    def run(self, stage: StageConfig, *, size: int, sequential: bool) -> list[Losses]:
        """Leave the batch's gradients in the model, `size` items at a time."""
        objectives = ObjectiveSet(self.model, self.readers)
        items = objectives.prepare(self.items, stage, sorted(self.readers))
        counts = total_counts(items)
        self.model.zero_grad()
        found = []
        for start in range(0, len(items), size):
            backward = Tensor.backward if sequential else None
            micro = items[start : start + size]
            found.append(objectives.compute(micro, stage, counts, backward=backward))
            if not sequential:
                found[-1].total.backward()
        return found

    def gradients(self) -> dict[str, Tensor]:
        """The gradients of the trained parameters that have one."""
        named = self.model.trained_parameters()
        return {name: p.grad.clone() for name, p in named if p.grad is not None}


@pytest.fixture(params=["context", "pure"])
def soft(request: pytest.FixtureRequest, llama_folder: Path, qwen_folder: Path) -> Setting:
    """Soft tokens, from an encoder that is trained."""
    parts = (runs.soft(expansion=1),)
    return Setting.of(tiny_config(llama_folder, qwen_folder, mode=request.param, attachments=parts))


@pytest.fixture(params=["context", "pure"])
def deep(request: pytest.FixtureRequest, llama_folder: Path, qwen_folder: Path) -> Setting:
    """Deep prefixes at positions that are learned."""
    config = tiny_config(
        *(llama_folder, qwen_folder),
        mode=request.param,
        attachments=(runs.deep(width=16, heads=2, expansion=1),),
        encoder={"latents": 5, "d_z": 8, "pooler": POOLERS.config("selected")},
        stages=(DEEP,),
    )
    return Setting.of(config)


def assert_same(setting: Setting, stage: StageConfig, *, size: int) -> None:
    """Losses and gradients of either way, to 1e-6 of the largest gradient of a parameter."""
    together = setting.run(stage, size=size, sequential=False)
    expected = setting.gradients()
    in_turn = setting.run(stage, size=size, sequential=True)
    found = setting.gradients()
    for ours, theirs in zip(in_turn, together, strict=True):
        assert ours.total.item() == theirs.total.item()
        assert not ours.total.requires_grad
        assert ours.sums == theirs.sums
        assert ours.measures == theirs.measures
        assert torch.equal(ours.latent_BMd, theirs.latent_BMd)
    assert found.keys() == expected.keys() == dict(setting.model.trained_parameters()).keys()
    for name, gradient in expected.items():
        largest = gradient.abs().max().item()
        assert largest > 0, name
        assert (found[name] - gradient).abs().max().item() <= 1e-6 * largest, name
    for reader in setting.readers.values():
        assert all(p.grad is None for p in reader.model.parameters())


@pytest.mark.parametrize("bits", [None, 16, 4])
@pytest.mark.parametrize("size", [2, 5])
def test_the_gradients_of_soft_tokens_are_those_of_the_sum(
    soft: Setting, size: int, bits: int | None
) -> None:
    assert_same(soft, replace(SOFT, quantize=bits), size=size)


@pytest.mark.parametrize("bits", [None, 6])
@pytest.mark.parametrize("size", [2, 5])
def test_the_gradients_of_deep_prefixes_are_those_of_the_sum(
    deep: Setting, size: int, bits: int | None
) -> None:
    """The encoder also learns from its positions' scores: a second way into it."""
    assert_same(deep, replace(DEEP, quantize=bits), size=size)


@pytest.mark.parametrize(
    ("kind", "options", "own"),
    [
        ("vq", {"bits": 4, "passing": "rotation"}, "commitment"),
        ("fsq", {"bits": 3, "running_prior": True}, "rate"),
    ],
)
def test_the_gradients_of_a_bottleneck_are_those_of_the_sum(
    kind: str, options: dict[str, Any], own: str, llama_folder: Path, qwen_folder: Path
) -> None:
    bottleneck = BOTTLENECKS.config(kind, **options)
    losses = weighted(answer=1.0, autoencode=0.2, continuation=0.8, **{own: 0.3})
    stage = StageConfig("sent", steps=1, quantize=bottleneck.bits, objectives=losses)
    parts = (runs.soft(expansion=1),)
    config = tiny_config(
        *(llama_folder, qwen_folder), attachments=parts, bottleneck=bottleneck, stages=(stage,)
    )
    setting = Setting.of(config)
    assert_same(setting, stage, size=2)
    alone = replace(stage, objectives=weighted(**{own: 0.3}))
    setting.run(alone, size=5, sequential=True)
    assert any(name.startswith("encoder.") for name in setting.gradients())


def test_a_frozen_encoder_gets_no_gradient(soft: Setting) -> None:
    """As with a run on a base: backward ends where nothing behind it is trained."""
    soft.model.encoder.requires_grad_(False)
    soft.run(SOFT, size=5, sequential=True)
    assert all(p.grad is None for p in soft.model.encoder.parameters())
    assert all(p.grad is not None for p in soft.model.attachments.parameters())


def test_an_objective_that_is_only_reported_trains_nothing(soft: Setting) -> None:
    stage = StageConfig("answer", steps=1, objectives=weighted(answer=0.0, autoencode=1.0))
    losses = soft.run(stage, size=5, sequential=True)[0]
    assert all(losses.sums["answer", name] > 0 for name in soft.readers)
    found = soft.gradients()
    soft.run(replace(stage, objectives=weighted(autoencode=1.0)), size=5, sequential=False)
    expected = soft.gradients()
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6)


# --- memory -------------------------------------------------------------------------------------


class SavedTensors:
    """Bytes that autograd holds for backward, now and at their most.

    Storages that outlive a pass anyway, such as weights, count each time that they are saved, in
    both ways of going backward alike.
    """

    def __init__(self) -> None:
        self.now = self.most = 0

    class _Kept:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    def pack(self, tensor: Tensor) -> _Kept:
        size = tensor.numel() * tensor.element_size()
        self.now += size
        self.most = max(self.most, self.now)
        kept = self._Kept(tensor)
        weakref.finalize(kept, self._drop, size)
        return kept

    def _drop(self, size: int) -> None:
        self.now -= size

    def unpack(self, kept: _Kept) -> Tensor:
        return kept.tensor


def most_bytes(setting: Setting, names: Sequence[str], *, sequential: bool) -> int:
    """The most that autograd held for a step with these readers."""
    saved = SavedTensors()
    readers = {name: setting.readers[name] for name in names}
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
        Setting(setting.model, readers, setting.items).run(SOFT, size=5, sequential=sequential)
    assert saved.now == 0, "something of a graph is kept"
    return saved.most


def test_one_readers_graph_is_held_at_a_time(soft: Setting) -> None:
    """At its most as much as the larger reader alone needs, which is less than both together."""
    alone = [most_bytes(soft, [name], sequential=False) for name in sorted(soft.readers)]
    together = most_bytes(soft, sorted(soft.readers), sequential=False)
    in_turn = most_bytes(soft, sorted(soft.readers), sequential=True)
    assert in_turn <= 1.01 * max(alone)
    assert in_turn < 0.75 * together


# --- what objectives share ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "passes"),
    [
        ({"answer": 1.0}, 1),
        ({"kd": 1.0}, 2),
        ({"answer": 1.0, "kd": 0.5}, 2),
        ({"kd": 0.5, "answer": 1.0, "embed": 1.0}, 2),
        ({"embed": 1.0}, 0),
        ({"answer": 1.0, "autoencode": 1.0, "continuation": 1.0}, 3),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else None,
)
def test_no_pass_of_a_reader_is_run_twice(
    soft: Setting, monkeypatch: pytest.MonkeyPatch, weights: dict[str, float], passes: int
) -> None:
    """Distillation reads the answers behind the latents and behind the text; the cross-entropy
    takes the first of these passes over."""
    read: list[str] = []
    target_hidden = Reader.target_hidden

    def watched(reader: Reader, batch: Any) -> Tensor:
        read.append(reader.name)
        return target_hidden(reader, batch)

    monkeypatch.setattr(Reader, "target_hidden", watched)
    stage = StageConfig("stage", steps=1, objectives=weighted(**weights))
    losses = soft.run(stage, size=5, sequential=True)[0]
    assert {kind for kind, _ in losses.sums} == set(weights)
    assert sorted(read) == sorted([*soft.readers] * passes)


def test_a_deep_prefix_is_made_once_for_all_objectives(deep: Setting) -> None:
    """The answers' pass, and what its keys, values and attention are compared with."""
    if deep.model.mode != "context":
        pytest.skip("attention matching is of context mode")
    made: list[str] = []
    for name in deep.readers:
        for part in deep.model.parts(name).values():
            part.register_forward_hook(lambda *_, reader=name: made.append(reader))
    objectives = weighted(answer=1.0, kd=0.5, attention=1.0, kv=0.7, select=1.0)
    stage = StageConfig("stage", steps=1, objectives=objectives)
    losses = deep.run(stage, size=5, sequential=True)[0]
    assert {kind for kind, _ in losses.sums} == {"answer", "kd", "attention", "kv", "select"}
    assert sorted(made) == sorted(deep.readers)


def test_the_order_of_a_stages_objectives_changes_no_loss(deep: Setting) -> None:
    """The text is read once for its keys and values and for its attention, whichever comes
    first."""
    forth = deep.run(DEEP, size=5, sequential=False)[0]
    turned = replace(DEEP, objectives=DEEP.objectives[::-1])
    back = deep.run(turned, size=5, sequential=False)[0]
    assert back.sums.keys() == forth.sums.keys()
    for key, value in forth.sums.items():
        assert back.sums[key].item() == pytest.approx(value.item(), rel=1e-6), key
