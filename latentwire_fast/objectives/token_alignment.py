"""Positions of one tokenisation of a text as positions of another, by characters."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import torch
from torch import Tensor

Ends = Sequence[tuple[Sequence[int], Sequence[int]]]


"""Per text, where each token ends in an encoder's and in a reader's tokenisation of it."""


def _covering(ends: Sequence[int], others: Sequence[int]) -> list[int]:
    """For each token, by where it ends: the token of another tokenisation with its last character.

    The other's last token, if that ends before it.
    """
    return [min(bisect_left(others, end), len(others) - 1) for end in ends]


def move_places(places_BM: Tensor, ends: Ends) -> Tensor:
    """An encoder's positions `[B, M]` of each text as the reader's of the same characters."""
    moved = [_covering(own, others) for own, others in ends]
    return torch.tensor(
        [
            [row[place] for place in places]
            for row, places in zip(moved, places_BM.tolist(), strict=True)
        ],
        device=places_BM.device,
    )


def move_attention(attention_BT: Tensor, ends: Ends, scores_BT: Tensor) -> Tensor:
    """A reader's attention as shares `[B, T]` of an encoder's positions, summing to 1 over those
    with a score."""
    moved_BT = torch.zeros_like(scores_BT)
    for b, (own, others) in enumerate(ends):
        within = [end for end in others if end <= own[-1]]  # the question comes behind
        index = torch.tensor(_covering(within, own), device=moved_BT.device)
        moved_BT[b].index_add_(0, index, attention_BT[b, : len(within)].to(moved_BT))
    moved_BT = moved_BT.masked_fill(scores_BT.isinf(), 0.0)
    return moved_BT / moved_BT.sum(1, keepdim=True).clamp(min=1e-9)
