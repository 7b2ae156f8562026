"""The first tokens of answers, as a reader predicts them behind a latent: for the log.

A latent that says nothing shows here first: one token for all examples, or none that stands out.
Shapes: N answers, D the reader's width.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from latentwire_fast.objectives.micro_batch import ReaderBatch


class FirstTokens(NamedTuple):
    """Sums over the answers of a micro-batch, 0-d, but for the ids.

    Attributes:
        accuracy: how many of the most probable tokens are the true ones.
        margin: log-probability of the true token minus that of the likeliest other one; below 0
            where the answer begins wrong.
        entropy: of the probabilities, in nats.
        ids_N: the most probable token of each answer.
    """

    accuracy: Tensor
    margin: Tensor
    entropy: Tensor
    ids_N: Tensor


def first_tokens(batch: ReaderBatch) -> FirstTokens:
    """The measures of one reader, of the forward pass that its answers were scored in."""
    answers = batch.answers
    is_first_N = answers.first_N(1)
    hidden_ND, labels_N = answers.hidden_ND[is_first_N], answers.batch.labels_N[is_first_N]
    found = batch.reader.output_head.confidence(hidden_ND, labels_N)
    correct_N = found.ids_N == labels_N.to(found.ids_N.device)
    return FirstTokens(correct_N.sum(), found.margin_N.sum(), found.entropy_N.sum(), found.ids_N)
