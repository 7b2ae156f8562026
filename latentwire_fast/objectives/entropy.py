"""Entropy of the first tokens: a reader that says the same first token of every text is stopped.

Shapes: A answers, D the reader's width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
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
    """How far the entropy of the predicted first tokens is below what it should be, in nats.

    `batch`: of the mean prediction over the answers of a micro-batch, against the entropy of their
    true first tokens. The answers together are to be as different as they are, and each of them may
    be sure.

    `answer`: of each prediction by itself, against `least`. A control: a reader that is unsure of
    every answer, in the same way, satisfies it.
    """

    @dataclass(frozen=True)
    class Config(ObjectiveConfig):
        """Settings of the entropy.

        Attributes:
            form: see the class.
            least: nats, of the form `answer`.
        """

        reads_answers: ClassVar[bool] = True

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
        if self.config.form == "answer":
            entropy_A = torch.cat(_by_chunks(_entropies, head, hidden_AD))
            return (self.config.least - entropy_A).clamp(min=0).sum()
        total_V = torch.stack(_by_chunks(_total, head, hidden_AD)).sum(0)
        found = _entropy(total_V / len(hidden_AD))
        counts = answers.batch.labels_N[is_first_N].unique(return_counts=True)[1]
        wanted = _entropy(counts.to(total_V) / len(hidden_AD))
        return len(hidden_AD) * (wanted - found).clamp(min=0)


def _by_chunks(
    measure: Callable[[OutputHead, Tensor], Tensor], head: OutputHead, hidden_AD: Tensor
) -> list[Tensor]:
    """A measure of some answers at a time, whose logits are made again in the backward pass."""
    chunks = head.chunks(hidden_AD)
    return [checkpoint(measure, head, chunk, use_reentrant=False) for (chunk,) in chunks]


def _total(head: OutputHead, hidden_nD: Tensor) -> Tensor:
    """The sum `[V]` of predictions."""
    return head.logits(hidden_nD).softmax(-1).sum(0)


def _entropies(head: OutputHead, hidden_nD: Tensor) -> Tensor:
    """The entropy of each prediction."""
    return _entropy(head.logits(hidden_nD).softmax(-1))


def _entropy(probs: Tensor) -> Tensor:
    """The entropy of probabilities `[..., V]` in nats; where one is 0, its gradient is finite."""
    return -(probs * probs.clamp(min=torch.finfo(probs.dtype).tiny).log()).sum(-1)
