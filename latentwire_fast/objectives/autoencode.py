"""Autoencoding: a reader writes out the text that the latent stands for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from latentwire_fast.config.schema import ObjectiveConfig
from latentwire_fast.objectives.base import Objective
from latentwire_fast.objectives.micro_batch import ReaderBatch
from latentwire_fast.objectives.prepared import PreparedItem, count_targets
from latentwire_fast.prompts.builder import replaced_text
from latentwire_fast.readers.reader import Reader


class Autoencode(Objective):
    """Cross-entropy over the text that the latent stands for."""

    @dataclass(frozen=True)
    class Config(ObjectiveConfig):
        """Settings of autoencoding: its weight alone."""

        takes_chunks: ClassVar[bool] = True
        takes_fewer: ClassVar[bool] = True

    def prepare(self, prepared: PreparedItem, reader: Reader) -> int:
        """Counts tokens."""
        item = prepared.item
        text = replaced_text(item.context, item.question, mode=prepared.mode)
        prompt = prepared.prompt("autoencode", reader, lambda: reader.prompts.build_rebuild(text))
        return count_targets(prompt)

    def compute(self, batch: ReaderBatch) -> Tensor:
        """The cross-entropy, summed over tokens."""
        encoded = batch.encoded
        inputs = batch.task_inputs("autoencode", encoded.sent_BMd, encoded.pieces)
        return batch.cross_entropy("autoencode", inputs, trained=self.config.weight != 0)
