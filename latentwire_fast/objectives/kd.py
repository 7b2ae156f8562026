"""Distillation: with the latent a reader predicts what it predicts with the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from latentwire_fast.config.base import require
from latentwire_fast.config.schema import ObjectiveConfig
from latentwire_fast.objectives.base import Objective
from latentwire_fast.objectives.micro_batch import AnswerTerm, ReaderBatch
from latentwire_fast.objectives.prepared import PreparedItem, count_targets
from latentwire_fast.readers.reader import Reader


class KD(Objective):
    """KL divergence to the text-prompted reader at the answers' tokens, times tau squared."""

    @dataclass(frozen=True)
    class Config(ObjectiveConfig):
        """Settings of distillation.

        Attributes:
            tau: temperature of both distributions.
            tokens: how many tokens of each answer count; None: all of them and EOS.
        """

        reads_answers: ClassVar[bool] = True
        takes_chunks: ClassVar[bool] = True
        takes_fewer: ClassVar[bool] = True

        tau: float = 1.0
        tokens: int | None = None

        def __post_init__(self) -> None:
            super().__post_init__()
            require(self.tau > 0, f"objective {self.kind!r}: tau={self.tau}, expected above 0")
            require(
                self.tokens is None or self.tokens >= 1,
                f"objective {self.kind!r}: tokens={self.tokens}, expected at least 1, or none",
            )

    config: Config

    def prepare(self, prepared: PreparedItem, reader: Reader) -> int:
        """Counts tokens."""
        prepared.text_prompt(reader)
        return count_targets(prepared.latent_prompt(reader), self.config.tokens)

    @property
    def term(self) -> AnswerTerm:
        """The divergence."""
        trained = self.config.weight != 0
        return AnswerTerm(self.config.tokens, tau=self.config.tau, trained=trained)

    def kept_bytes(self, prepared: PreparedItem, reader: Reader) -> int:
        """The teacher's hidden states, fp16."""
        return 2 * reader.d_model * count_targets(prepared.text_prompt(reader))

    def compute(self, batch: ReaderBatch) -> Tensor:
        """The divergence, summed over tokens."""
        return batch.answer_losses(self.term).kd
