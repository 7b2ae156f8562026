"""The answers' cross-entropy: what the readers are to say when they read the latent."""

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


class Answer(Objective):
    """Cross-entropy over the answers' tokens behind the latent; also reports their accuracy."""

    @dataclass(frozen=True)
    class Config(ObjectiveConfig):
        """Settings of the answers' cross-entropy.

        Attributes:
            tokens: how many tokens of each answer count; None: all of them and EOS.
            label_smoothing: share of each label that is spread evenly over all tokens.
        """

        reads_answers: ClassVar[bool] = True
        takes_chunks: ClassVar[bool] = True
        takes_fewer: ClassVar[bool] = True
        reports_accuracy: ClassVar[bool] = True

        tokens: int | None = None
        label_smoothing: float = 0.0

        def __post_init__(self) -> None:
            super().__post_init__()
            require(
                self.tokens is None or self.tokens >= 1,
                f"objective {self.kind!r}: tokens={self.tokens}, expected at least 1, or none",
            )
            require(
                0 <= self.label_smoothing < 1,
                f"objective {self.kind!r}: label_smoothing={self.label_smoothing}, expected in "
                "[0, 1)",
            )

    config: Config

    def prepare(self, prepared: PreparedItem, reader: Reader) -> int:
        """Counts tokens."""
        return count_targets(prepared.latent_prompt(reader), self.config.tokens)

    @property
    def term(self) -> AnswerTerm:
        """The labels' loss."""
        config = self.config
        return AnswerTerm(
            config.tokens, trained=config.weight != 0, smoothing=config.label_smoothing
        )

    def compute(self, batch: ReaderBatch) -> Tensor:
        """Cross-entropy; `accuracy` is of the most probable tokens, each behind the true ones."""
        losses = batch.answer_losses(self.term)
        batch.report("accuracy", losses.correct)
        return losses.cross_entropy
