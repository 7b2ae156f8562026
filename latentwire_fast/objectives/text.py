"""Answers behind the text itself: a reader with low-rank updates learns them beside its latents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from latentwire_fast.config.base import require
from latentwire_fast.config.schema import ObjectiveConfig, RunConfig
from latentwire_fast.objectives.base import Objective
from latentwire_fast.objectives.micro_batch import ReaderBatch
from latentwire_fast.objectives.prepared import PreparedItem, count_targets
from latentwire_fast.readers.reader import Reader


class Text(Objective):
    """Cross-entropy over the answers behind context and question as text; trains a LoRA alone.

    With schedules this is the seeds' warm-up from text to latents: `text.weight` falls from 1 to a
    small share, its tail, while `answer.weight` rises.
    """

    @dataclass(frozen=True)
    class Config(ObjectiveConfig):
        """Settings of the answers behind the text: their weight alone."""

        reads_answers: ClassVar[bool] = True
        takes_chunks: ClassVar[bool] = True
        takes_fewer: ClassVar[bool] = True

        def check(self, run: RunConfig) -> None:
            """Raise unless every reader has something that it trains."""
            frozen = sorted(name for name, reader in run.readers.items() if reader.lora is None)
            require(
                not frozen,
                f"objective {self.kind!r} trains low-rank updates of readers, and {frozen} have "
                "none; give them `lora` settings, or leave it out",
            )

    def prepare(self, prepared: PreparedItem, reader: Reader) -> int:
        """Counts tokens."""
        return count_targets(prepared.text_prompt(reader))

    def compute(self, batch: ReaderBatch) -> Tensor:
        """The cross-entropy, summed over tokens."""
        read = batch.reader.collate(batch.prompts("text"))
        hidden_ND = batch.reader.target_hidden(read)
        return batch.reader.output_head.losses(
            hidden_ND, read.labels_N, cross_entropy_gradient=self.config.weight != 0
        ).cross_entropy
