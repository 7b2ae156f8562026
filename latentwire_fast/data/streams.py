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
    """One latent's worth of training data: a context and the questions asked of it.

    Attributes:
        turns: none of a plain text.
    """

    id: str
    context: str
    turns: tuple[Turn, ...]

    @property
    def question(self) -> str:
        """The first question; empty where there is none."""
        return self.turns[0].question if self.turns else ""


class Stream(Protocol):
    """The source of training batches.

    Attributes:
        digest: of the data, where there are files that may change; empty where there are none.
    """

    digest: str

    def batch(
        self,
        step: int,
        size: int,
        *,
        facts: int,
        texts: bool = False,
        counted: tuple[int, int] | None = None,
    ) -> list[TrainItem]:
        """The batch of one step: items with questions, or texts without any.

        Args:
            facts: the curriculum's level where the source has one.
            texts: whether it may be one of texts.
            counted: where the share of texts is scheduled, how many batches of them there are
                before this step and with it.
        """
        ...


class TestbedStream:
    """Endless passages of training names. A fifth of a batch keeps easier passages in the mix."""

    __test__ = False
    digest = ""

    def __init__(self, config: DataConfig, *, mode: Mode, seed: int) -> None:
        self.config = config
        self.mode = mode
        self.seed = seed

    def batch(
        self,
        step: int,
        size: int,
        *,
        facts: int,
        texts: bool = False,
        counted: tuple[int, int] | None = None,
    ) -> list[TrainItem]:
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
    """A finite data set in epochs; each epoch is a permutation drawn from (seed, epoch).

    Contexts with questions and texts without any come in batches of their own.

    Attributes:
        items: contexts with questions. texts: those without.
        text_share: of the batches that may be of texts, how many are.

    Raises:
        DataError: no examples, or in pure mode no questions.
    """

    def __init__(
        self, examples: Sequence[Example], config: DataConfig, *, mode: Mode, seed: int
    ) -> None:
        self.seed = seed
        per_item = config.questions_per_context if mode == "context" else 1
        grouped = _group(examples, per_item)
        self.items = [item for item in grouped if item.turns]
        self.texts = [item for item in grouped if not item.turns]
        if not grouped or (mode == "pure" and not self.items):
            raise DataError("no training examples with an answer; check the data source")
        self.text_share = self._text_share(config.text_share)
        self.digest = _digest(grouped)

    def _text_share(self, wanted: float | None) -> float:
        if not (self.items and self.texts):
            return float(not self.items)
        return len(self.texts) / len(self.items + self.texts) if wanted is None else wanted

    def epoch_steps(self, size: int, *, texts: bool = False) -> float:
        """How many batches of so many items are one pass over all that such batches hold: over the
        items with questions, unless there are none."""
        if not self.items:
            return len(self.texts) / size
        share = self.text_share if texts else 0.0
        return len(self.items) / size / (1 - share) if share < 1 else len(self.texts) / size

    def batch(
        self,
        step: int,
        size: int,
        *,
        facts: int,
        texts: bool = False,
        counted: tuple[int, int] | None = None,
    ) -> list[TrainItem]:
        """Items `step * size` on, epoch after epoch; in a mixture of both kinds, the batches of
        each kind are counted apart."""
        if not texts:
            return self._items("", self.items, step, size)
        # Batches of texts before this step and with it: spread evenly.
        before, after = int(step * self.text_share), int((step + 1) * self.text_share)
        if counted is not None and self.items and self.texts:
            before, after = counted
        if after > before:
            return self._items("texts:", self.texts, before, size)
        return self._items("", self.items, step - before, size)

    def _items(
        self, kind: str, items: Sequence[TrainItem], number: int, size: int
    ) -> list[TrainItem]:
        """The batch of this number, of one kind."""
        orders: dict[int, list[int]] = {}
        found = []
        for position in range(number * size, (number + 1) * size):
            epoch, index = divmod(position, len(items))
            if epoch not in orders:
                orders[epoch] = _order(f"{kind}{self.seed}:{epoch}", len(items))
            found.append(items[orders[epoch][index]])
        return found


def _order(seed: str, count: int) -> list[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


def _digest(items: Sequence[TrainItem]) -> str:
    """sha256 of all that is trained on, in its order."""
    digest = hashlib.sha256()
    for item in items:
        turns = [[turn.question, turn.answer] for turn in item.turns]
        digest.update(json.dumps([item.id, item.context, turns]).encode())
    return digest.hexdigest()


def _group(examples: Sequence[Example], per_item: int) -> list[TrainItem]:
    """Examples that share a context, up to `per_item` questions each; plain texts have none."""
    by_context: dict[str, list[Example]] = {}
    for example in examples:
        by_context.setdefault(example.context, []).append(example)
    items = []
    for context, group in by_context.items():
        for start in range(0, len(group), per_item):
            part = group[start : start + per_item]
            turns = tuple(Turn(e.question, e.answers[0]) for e in part if e.answers)
            if turns or not any(e.question for e in part):
                items.append(TrainItem(part[0].id, context, turns))
    return items
