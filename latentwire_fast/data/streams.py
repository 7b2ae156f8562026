"""Training batches as a pure function of (seed, step): resuming needs no state, and nothing repeats
by accident."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from latentwire_fast.config.schema import DataConfig, Mode
from latentwire_fast.data.examples import Example
from latentwire_fast.data.testbed import make_passage
from latentwire_fast.errors import DataError
from latentwire_fast.prompts.builder import Turn


@dataclass(frozen=True)
class TrainItem:
    """One latent's worth of training data: a context and the questions asked of it."""

    id: str
    context: str
    turns: tuple[Turn, ...]


class Stream(Protocol):
    """The source of training batches.

    Attributes:
        digest: of the data, where there are files that may change; empty where there are none.
    """

    digest: str

    def batch(self, step: int, size: int, *, facts: int) -> list[TrainItem]:
        """The batch of one step; `facts` is the curriculum's level where the source has one."""
        ...


class TestbedStream:
    """Endless passages of training names. A fifth of a batch keeps easier passages in the mix."""

    __test__ = False
    digest = ""

    def __init__(self, config: DataConfig, *, mode: Mode, seed: int) -> None:
        self.config = config
        self.mode = mode
        self.seed = seed

    def batch(self, step: int, size: int, *, facts: int) -> list[TrainItem]:
        """`size` items; in pure mode each holds one question."""
        rng = random.Random(f"{self.seed}:{step}")
        easier = [n for n in (1, 2, 4, 6) if n <= facts]
        items: list[TrainItem] = []
        while len(items) < size:
            level = facts if rng.random() < 0.8 else rng.choice(easier)
            similar = level > 1 and rng.random() < self.config.similar
            passage = make_passage(
                rng, facts=level, split="train", relations=2 if similar else None
            )
            turns = [Turn(question, answer) for question, answer in passage.questions]
            turns = turns[: self.config.questions_per_context]
            # Pure mode asks one question per latent; questions on one passage teach the difference.
            per_item = [turns] if self.mode == "context" else [[turn] for turn in turns]
            for part in per_item[: size - len(items)]:
                name = f"testbed-{self.seed}-{step}-{len(items)}"
                items.append(TrainItem(name, passage.context, tuple(part)))
        return items


class ExampleStream:
    """A finite data set in epochs; each epoch is a permutation drawn from (seed, epoch)."""

    def __init__(
        self, examples: Sequence[Example], config: DataConfig, *, mode: Mode, seed: int
    ) -> None:
        self.seed = seed
        per_item = config.questions_per_context if mode == "context" else 1
        self.items = _group(examples, per_item)
        if not self.items:
            raise DataError("no training examples with an answer; check the data source")
        self.digest = _digest(self.items)

    def batch(self, step: int, size: int, *, facts: int) -> list[TrainItem]:
        """Items `step * size` on, epoch after epoch."""
        orders: dict[int, list[int]] = {}
        items = []
        for position in range(step * size, (step + 1) * size):
            epoch, index = divmod(position, len(self.items))
            if epoch not in orders:
                orders[epoch] = self._order(epoch)
            items.append(self.items[orders[epoch][index]])
        return items

    def _order(self, epoch: int) -> list[int]:
        order = list(range(len(self.items)))
        random.Random(f"{self.seed}:{epoch}").shuffle(order)
        return order


def _digest(items: Sequence[TrainItem]) -> str:
    """sha256 of all that is trained on, in its order."""
    digest = hashlib.sha256()
    for item in items:
        turns = [[turn.question, turn.answer] for turn in item.turns]
        digest.update(json.dumps([item.id, item.context, turns]).encode())
    return digest.hexdigest()


def _group(examples: Sequence[Example], per_item: int) -> list[TrainItem]:
    """Examples that share a context, up to `per_item` questions each."""
    by_context: dict[str, list[Example]] = {}
    for example in examples:
        by_context.setdefault(example.context, []).append(example)
    items = []
    for context, group in by_context.items():
        for start in range(0, len(group), per_item):
            part = group[start : start + per_item]
            turns = tuple(Turn(e.question, e.answers[0]) for e in part if e.answers)
            if turns:
                items.append(TrainItem(part[0].id, context, turns))
    return items
