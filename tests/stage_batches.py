"""A small model with its readers and a ragged batch: what tests of single objectives compute on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentwire_fast.config.schema import ObjectiveConfig, StageConfig
from latentwire_fast.data.streams import TestbedStream, TrainItem
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.objectives.micro_batch import EncodedBatch, ReaderBatch
from latentwire_fast.objectives.objective_set import Losses, ObjectiveSet
from latentwire_fast.objectives.prepared import PreparedItem, total_counts
from latentwire_fast.objectives.teacher_cache import TeacherCache
from latentwire_fast.readers.reader import Reader, load_readers
from latentwire_fast.registry import OBJECTIVES
from latentwire_fast.training.builders import build_model
from runs import tiny_config


@dataclass
class StageBatch:
    """A fresh model, its readers, and five items of several questions each."""

    model: Interlingua
    readers: dict[str, Reader]
    items: list[TrainItem]

    @classmethod
    def of(cls, *folders: Path, **changes: Any) -> StageBatch:
        """For these readers, without randomness in a step."""
        config = tiny_config(*folders, **changes)
        readers = load_readers(config.readers)
        torch.manual_seed(3)
        model = build_model(config, readers).eval()
        stream = TestbedStream(config.data, mode=config.mode, seed=7)
        items = [item for facts in (1, 2, 4) for item in stream.batch(facts, 2, facts=facts)]
        return cls(model, readers, items[:5])

    def prepare(self, stage: StageConfig) -> list[PreparedItem]:
        """The items with their prompts."""
        return ObjectiveSet(self.model, self.readers).prepare(
            self.items, stage, sorted(self.readers)
        )

    def compute(
        self, *objectives: ObjectiveConfig, size: int = 5, teacher: TeacherCache | None = None
    ) -> list[Losses]:
        """The losses of micro-batches of this size; their gradients are left in the model."""
        stage = StageConfig("s", steps=1, objectives=objectives)
        items = self.prepare(stage)
        parts = ObjectiveSet(self.model, self.readers, teacher=teacher)
        self.model.zero_grad(set_to_none=True)
        found = []
        for start in range(0, len(items), size):
            losses = parts.compute(items[start : start + size], stage, total_counts(items))
            if losses.total.requires_grad:
                losses.total.backward()
            found.append(losses)
        return found

    def gradients(self) -> dict[str, Tensor]:
        """The gradients that are there."""
        named = self.model.trained_parameters()
        return {name: p.grad.clone() for name, p in named if p.grad is not None}

    def reader_batch(self, name: str, *objectives: ObjectiveConfig) -> ReaderBatch:
        """One reader's view of the whole batch."""
        stage = StageConfig("s", steps=1, objectives=objectives)
        items = self.prepare(stage)
        encoded = EncodedBatch(items, self.model, bits=None, select=False, cut=False)
        parts = ObjectiveSet(self.model, self.readers).of(stage).values()
        terms = [part.term for part in parts if part.term is not None]
        return ReaderBatch(encoded, self.readers[name], teacher=None, terms=terms)


def objective(kind: str, **settings: Any) -> ObjectiveConfig:
    """Settings of an objective."""
    config: ObjectiveConfig = OBJECTIVES.config(kind, **settings)
    return config


def assert_cut_alike(batch: StageBatch, *objectives: ObjectiveConfig) -> None:
    """Micro-batches of two give the losses and the gradients of the whole batch."""
    whole = batch.compute(*objectives)
    expected = batch.gradients()
    parts = batch.compute(*objectives, size=2)
    found = batch.gradients()
    total = sum(losses.total.item() for losses in parts)
    assert abs(total - whole[0].total.item()) <= 1e-5 * abs(total)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        largest = gradient.abs().max().item()
        assert (found[name] - gradient).abs().max().item() <= 2e-4 * largest + 1e-9, name
