"""The first token of an answer, with a loss of its own: the token that decides how decoding goes
on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from latentwire_fast.config.base import require
from latentwire_fast.config.schema import ObjectiveConfig
from latentwire_fast.objectives.base import Objective
from latentwire_fast.objectives.micro_batch import ReaderBatch
from latentwire_fast.objectives.prepared import PreparedItem, count_targets
from latentwire_fast.readers.reader import Reader


class FirstToken(Objective):
    """Cross-entropy over the first token of each answer behind the latent.

    It scales itself (`auto_scale`): a token that is right already counts little, one that is wrong
    counts fully. The factor is that of focal loss (Lin et al. 2017), and has no gradient.
    """

    @dataclass(frozen=True)
    class Config(ObjectiveConfig):
        """Settings of the first tokens' cross-entropy.

        Attributes:
            auto_scale: each token counts `(1 - p) ** auto_scale`, where p is the probability that
                the reader gives to the true token; 0: all count 1.
        """

        reads_answers: ClassVar[bool] = True
        takes_chunks: ClassVar[bool] = True
        takes_fewer: ClassVar[bool] = True

        auto_scale: float = 0.0

        def __post_init__(self) -> None:
            super().__post_init__()
            require(
                self.auto_scale >= 0,
                f"objective {self.kind!r}: auto_scale={self.auto_scale}, expected at least 0",
            )

    config: Config

    def prepare(self, prepared: PreparedItem, reader: Reader) -> int:
        """Counts tokens: one for each answer."""
        return count_targets(prepared.latent_prompt(reader), 1)

    def compute(self, batch: ReaderBatch) -> Tensor:
        """The cross-entropy, summed over tokens; also reports the mean factor."""
        answers, head = batch.answers, batch.reader.output_head
        is_first_N = answers.first_N(1)
        hidden_ND, labels_N = answers.hidden_ND[is_first_N], answers.batch.labels_N[is_first_N]
        weights_N = None
        if self.config.auto_scale:
            missed_N = 1 - head.confidence(hidden_ND, labels_N).true_N.exp()
            weights_N = missed_N.clamp(min=0) ** self.config.auto_scale
            batch.report("first_token_scale", weights_N.sum())
        return head.losses(
            hidden_ND,
            labels_N,
            label_weights=weights_N,
            cross_entropy_gradient=self.config.weight != 0,
        ).cross_entropy
