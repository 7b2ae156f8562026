"""Distillation of hard answers: those that a reader begins wrong, and those where its teacher says
more than one token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from latentwire_fast.config.base import require
from latentwire_fast.config.schema import ObjectiveConfig
from latentwire_fast.objectives.base import Objective
from latentwire_fast.objectives.micro_batch import ReaderBatch
from latentwire_fast.objectives.prepared import PreparedItem, count_targets
from latentwire_fast.readers.reader import Reader


class HardKD(Objective):
    """The divergence of `kd`, each answer times `base + missed * (1 - p) + entropy * H`.

    p is the probability of the true first token behind the latent, H the entropy of the teacher's
    prediction of it in nats, both without gradient. A factor depends on its own answer alone, so
    that cutting a batch changes nothing.
    """

    @dataclass(frozen=True)
    class Config(ObjectiveConfig):
        """Settings of the distillation of hard answers.

        Attributes:
            base: what every answer counts.
            missed: what one more counts whose first token is wrong.
            entropy: what one more counts per nat of the teacher's entropy.
            tau: temperature of both distributions.
            tokens: how many tokens of each answer count; None: all of them and EOS.
        """

        reads_answers: ClassVar[bool] = True
        takes_chunks: ClassVar[bool] = True
        takes_fewer: ClassVar[bool] = True

        base: float = 0.0
        missed: float = 1.0
        entropy: float = 0.5
        tau: float = 1.0
        tokens: int | None = None

        def __post_init__(self) -> None:
            super().__post_init__()
            self.at_least_one("tokens")
            require(self.tau > 0, f"objective {self.kind!r}: tau={self.tau}, expected above 0")
            factors = (self.base, self.missed, self.entropy)
            require(
                min(factors) >= 0 < max(factors),
                f"objective {self.kind!r}: base, missed and entropy are {factors}, expected at "
                "least 0, and one of them above",
            )

    config: Config

    def prepare(self, prepared: PreparedItem, reader: Reader) -> int:
        """Counts tokens."""
        prepared.text_prompt(reader)
        return count_targets(prepared.latent_prompt(reader), self.config.tokens)

    def kept_bytes(self, prepared: PreparedItem, reader: Reader) -> int:
        """The teacher's hidden states, fp16."""
        return 2 * reader.d_model * count_targets(prepared.text_prompt(reader))

    def compute(self, batch: ReaderBatch) -> Tensor:
        """The divergence, summed over tokens; also reports the tokens' mean factor."""
        answers, config = batch.answers, self.config
        counts_N = answers.first_N(config.tokens)
        factors_N = self._factors(batch)[counts_N]
        batch.report("hard_factor", factors_N.sum())
        return batch.reader.output_head.losses(
            answers.hidden_ND[counts_N],
            None,
            teacher_hidden=batch.teacher_hidden_ND[counts_N].to(answers.hidden_ND),
            kd_weights=factors_N,
            kd_gradient=config.weight != 0,
            tau=config.tau,
        ).kd

    @torch.no_grad()
    def _factors(self, batch: ReaderBatch) -> Tensor:
        """What each token counts, by the first one of its answer."""
        answers, head = batch.answers, batch.reader.output_head
        is_first_N = answers.first_N(1)
        labels_A = answers.batch.labels_N[is_first_N]
        p_A = head.confidence(answers.hidden_ND[is_first_N], labels_A).true_N.exp()
        teacher_AD = batch.teacher_hidden_ND[is_first_N]
        entropy_A = head.confidence(teacher_AD, labels_A).entropy_N.to(p_A)
        config = self.config
        factors_A = config.base + config.missed * (1 - p_A) + config.entropy * entropy_A
        answer_N = is_first_N.to(factors_A.device).cumsum(0) - 1  # A answers, one behind another
        return factors_A.clamp(min=0)[answer_N].to(answers.hidden_ND.device)
