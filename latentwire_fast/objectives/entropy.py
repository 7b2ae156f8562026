"""Entropy of the first tokens: answers whose first tokens are predicted alike cost.

Shapes: A answers, D the reader's width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from latentwire_fast.config.base import require
from latentwire_fast.config.schema import ObjectiveConfig
from latentwire_fast.objectives.base import Objective
from latentwire_fast.objectives.micro_batch import ReaderBatch
from latentwire_fast.objectives.prepared import PreparedItem, count_targets
from latentwire_fast.readers.output_head import OutputHead
from latentwire_fast.readers.reader import Reader


class Entropy(Objective):
    """How far the predicted first tokens say less than the true ones, in nats.

    `batch`: the information that the predictions of a micro-batch have of which answer they are
    for, `H(mean) - mean H` (Bridle et al. 1991), against the entropy of the true first tokens. So
    answers have to be different, and each of them sure.

    `answer`: the entropy of each prediction by itself, against `least`. A control: a reader that is
    unsure of every answer, in the same way, satisfies it. Collapse looks like this: flat
    predictions, and always the same token on top.
    """

    @dataclass(frozen=True)
    class Config(ObjectiveConfig):
        """Settings of the entropy.

        Attributes:
            form: see the class.
            least: nats, of the form `answer`.
        """

        reads_answers: ClassVar[bool] = True
        takes_chunks: ClassVar[bool] = True
        takes_fewer: ClassVar[bool] = True

        form: Literal["batch", "answer"] = "batch"
        least: float = 1.0

        def __post_init__(self) -> None:
            super().__post_init__()
            require(
                self.least > 0, f"objective {self.kind!r}: least={self.least}, expected above 0"
            )

    config: Config

    def prepare(self, prepared: PreparedItem, reader: Reader) -> int:
        """Counts tokens: one for each answer."""
        return count_targets(prepared.latent_prompt(reader), 1)

    def compute(self, batch: ReaderBatch) -> Tensor:
        """What is missing, summed over answers."""
        answers, head = batch.answers, batch.reader.output_head
        is_first_N = answers.first_N(1)
        hidden_AD = answers.hidden_ND[is_first_N]
        # Some answers at a time, whose logits are made again in the backward pass.
        parts = [
            checkpoint(predictions, head, chunk_nD, use_reentrant=False)
            for (chunk_nD,) in head.chunks(hidden_AD)
        ]
        entropy_A = torch.cat([entropy_n for _, entropy_n in parts])
        if self.config.form == "answer":
            return (self.config.least - entropy_A).clamp(min=0).sum()
        mean_V = torch.stack([total_V for total_V, _ in parts]).sum(0) / len(entropy_A)
        counts = answers.batch.labels_N[is_first_N].unique(return_counts=True)[1]
        wanted = entropy(counts.to(mean_V) / len(entropy_A))
        return len(entropy_A) * (wanted - entropy(mean_V) + entropy_A.mean()).clamp(min=0)


def predictions(head: OutputHead, hidden_nD: Tensor) -> tuple[Tensor, Tensor]:
    """The sum `[V]` of some predictions, and the entropy of each."""
    probs_nV = head.logits(hidden_nD).softmax(-1)
    return probs_nV.sum(0), entropy(probs_nV)


def entropy(probs: Tensor) -> Tensor:
    """The entropy of probabilities `[..., V]` in nats; where one is 0, its gradient is finite."""
    return -(probs * probs.clamp(min=torch.finfo(probs.dtype).tiny).log()).sum(-1)
