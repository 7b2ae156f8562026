"""The first tokens of answers, as a reader predicts them behind a latent: for the log.

A latent that says nothing shows here first: one token for all examples, or none that stands out.
Shapes: N answers, D the reader's width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
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


@torch.no_grad()
def first_tokens(batch: ReaderBatch) -> FirstTokens:
    """The measures of one reader, of the forward pass that its answers were scored in."""
    answers = batch.answers
    is_first_N = answers.first_N(1)
    hidden_ND, labels_N = answers.hidden_ND[is_first_N], answers.batch.labels_N[is_first_N]
    parts = []
    for hidden_nD, labels_n in batch.reader.output_head.chunks(hidden_ND, labels_N):
        log_nV = batch.reader.output_head.logits(hidden_nD).log_softmax(-1)
        labels_n1 = labels_n.to(log_nV.device)[:, None]
        ids_n = log_nV.argmax(-1)
        true_n = log_nV.gather(1, labels_n1)[:, 0]
        other_n = log_nV.scatter(1, labels_n1, -torch.inf).amax(-1)
        entropy = torch.special.entr(log_nV.exp()).sum()
        correct = (ids_n == labels_n1[:, 0]).sum()
        parts.append(FirstTokens(correct, (true_n - other_n).sum(), entropy, ids_n))
    accuracies, margins, entropies, ids = zip(*parts, strict=True)
    return FirstTokens(
        torch.stack(accuracies).sum(),
        torch.stack(margins).sum(),
        torch.stack(entropies).sum(),
        torch.cat(ids),
    )
