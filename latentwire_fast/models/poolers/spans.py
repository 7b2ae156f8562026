"""Means over contiguous spans of a text's hidden states (as ARC-Encoder pools, arXiv:2510.20535).

Shapes: B texts, T positions, M latents, D the LM's width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from latentwire_fast.config.schema import PoolerConfig
from latentwire_fast.models.poolers.base import Pooler
from latentwire_fast.models.token_states import StatesFacts, TokenStates


class SpansPooler(Pooler):
    """The text's last hidden states, averaged over M contiguous spans. Nothing is learned."""

    @dataclass(frozen=True)
    class Config(PoolerConfig):
        """Averages of contiguous spans; there is nothing to set."""

    varies = True

    def __init__(self, config: Config, lm: StatesFacts) -> None:
        super().__init__(config, lm)
        self.latents = lm.latents

    @property
    def states(self) -> int:
        """The last layer's."""
        return 1

    def forward(self, text: TokenStates) -> Tensor:
        """States `[B, M, D]`."""
        hidden_BTD, lengths_B = text.hidden()
        return pool_spans(hidden_BTD, lengths_B, self.latents, counts_B=text.counts_B)


def pool_spans(
    hidden_BTD: Tensor, lengths_B: Tensor, spans: int, *, counts_B: Tensor | None = None
) -> Tensor:
    """Means `[B, spans, D]` over contiguous spans of near equal length of each row's first
    positions.

    A row shorter than `spans` repeats positions rather than averaging nothing.

    Args:
        counts_B: as in `span_weights`.
    """
    position = torch.arange(hidden_BTD.shape[1], device=hidden_BTD.device)
    weights = span_weights(position < lengths_B[:, None], spans, counts_B=counts_B)
    return weights.to(hidden_BTD) @ hidden_BTD


def span_weights(inside_BT: Tensor, spans: int, *, counts_B: Tensor | None = None) -> Tensor:
    """The weights `[B, spans, T]` of means over contiguous spans of the positions that are inside,
    which follow one another.

    Args:
        counts_B: into how many spans each row is cut, where that differs: its others are 0.
    """
    number_BT = inside_BT.long().cumsum(1) - 1  # of each position among those inside
    edge = torch.arange(spans + 1, device=inside_BT.device)
    count_B1 = spans if counts_B is None else counts_B.to(edge.device)[:, None]
    if isinstance(count_B1, Tensor):
        edge = torch.minimum(edge, count_B1)
    edges = edge * inside_BT.sum(1)[:, None]
    start = edges[..., :-1] // count_B1
    stop = torch.maximum(edges[..., 1:] // count_B1, start + 1)
    if isinstance(count_B1, Tensor):
        stop = torch.where(edge[:, 1:] > edge[:, :-1], stop, start)
    number_B1T = number_BT[:, None]
    chosen = (number_B1T >= start[..., None]) & (number_B1T < stop[..., None]) & inside_BT[:, None]
    return chosen / chosen.sum(-1, keepdim=True).clamp(min=1)
