"""Positions: an encoder scores a text's positions as the readers' answers attend to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from latentwire_fast.config.base import require
from latentwire_fast.config.schema import ObjectiveConfig, RunConfig
from latentwire_fast.objectives.base import Objective
from latentwire_fast.objectives.micro_batch import ReaderBatch
from latentwire_fast.objectives.positions import token_ends
from latentwire_fast.objectives.prepared import PreparedItem
from latentwire_fast.objectives.token_alignment import move_attention
from latentwire_fast.readers.reader import Reader


class Select(Objective):
    """Cross-entropy of the encoder's scores to the attention that the answers pay to positions."""

    counted = "texts"
    needs_positions = True

    @dataclass(frozen=True)
    class Config(ObjectiveConfig):
        """Settings of learning positions: their weight alone."""

        teaches_positions: ClassVar[bool] = True
        reads_answers: ClassVar[bool] = True
        takes_fewer: ClassVar[bool] = True

        def check(self, run: RunConfig) -> None:
            """Raise unless the run's encoder has positions to learn."""
            require(
                run.base is None,
                f"objective {self.kind!r} cannot train: the encoder of {run.base} keeps its "
                "positions; leave it out",
            )
            require(
                run.encoder.selects_positions,
                f"objective {self.kind!r} and encoder pooler 'selected' need each other: the "
                "positions are learned there",
            )

    def prepare(self, prepared: PreparedItem, reader: Reader) -> int:
        """Counts texts."""
        prepared.text_prompt(reader)
        return 1

    def compute(self, batch: ReaderBatch) -> Tensor:
        """The cross-entropy, summed over texts."""
        selection = batch.encoded.positions
        start = batch.reader.prompts.content_start
        attention_BT = move_attention(
            batch.observation.attention_BT[:, start:], token_ends(batch), selection.scores_BT
        )
        return F.cross_entropy(selection.scores_BT.clamp(min=-1e9), attention_BT, reduction="sum")
