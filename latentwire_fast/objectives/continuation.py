"""Continuation: a reader goes on with a text of which the latent stands for the first half."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from latentwire_fast.config.schema import ObjectiveConfig
from latentwire_fast.objectives.base import Objective
from latentwire_fast.objectives.micro_batch import ReaderBatch
from latentwire_fast.objectives.prepared import PreparedItem, count_targets
from latentwire_fast.readers.reader import Reader


def halves(text: str) -> tuple[str, str]:
    """A text cut at the word nearest to its middle."""
    words = text.split()
    middle = max(1, len(words) // 2)
    return " ".join(words[:middle]), " ".join(words[middle:])


class Continuation(Objective):
    """Cross-entropy over the second half of the context, behind a latent of the first."""

    @dataclass(frozen=True)
    class Config(ObjectiveConfig):
        """Settings of continuation: its weight alone."""

        takes_fewer: ClassVar[bool] = True

    def prepare(self, prepared: PreparedItem, reader: Reader) -> int:
        """Counts tokens."""
        _, rest = halves(prepared.item.context)
        prompt = prepared.prompt("continuation", reader, lambda: reader.prompts.build_rebuild(rest))
        return count_targets(prompt)

    def compute(self, batch: ReaderBatch) -> Tensor:
        """The cross-entropy, summed over tokens."""
        firsts = tuple(halves(prepared.item.context)[0] for prepared in batch.items)
        questions = ("",) * len(firsts) if batch.model.mode == "pure" else None
        half_BMd = batch.encoded.sent(firsts, questions)
        pieces = batch.encoded.pieces_of(firsts, questions)
        inputs = batch.task_inputs("continue", half_BMd, pieces)
        return batch.cross_entropy("continuation", inputs, trained=self.config.weight != 0)
