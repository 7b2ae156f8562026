"""The transformer layers that encoders, poolers and deep prefixes are built of."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from latentwire_fast.config.base import require
from latentwire_fast.models.token_states import StatesFacts


def pre_norm_layer(
    width: int, heads: int, *, expansion: int = 4, dropout: float = 0.0
) -> nn.TransformerEncoderLayer:
    """Bidirectional attention and a GELU MLP of `expansion * width`, each behind a LayerNorm.

    Takes `[B, T, width]`.
    """
    return nn.TransformerEncoderLayer(
        width,
        heads,
        expansion * width,
        dropout=dropout,
        activation="gelu",
        batch_first=True,
        norm_first=True,
    )


def pre_norm_decoder_layer(
    width: int, heads: int, *, expansion: int = 4, dropout: float = 0.0
) -> nn.TransformerDecoderLayer:
    """The same with attention to a memory between the two: takes `[B, M, width]`, and a memory
    `[B, T, width]`."""
    return nn.TransformerDecoderLayer(
        width,
        heads,
        expansion * width,
        dropout=dropout,
        activation="gelu",
        batch_first=True,
        norm_first=True,
    )


class SlotReader(nn.Module):
    """Learned slots that read states by cross-attention: any number of states to `slots` of them.

    Args:
        slots, width: what it makes is `[B, slots, width]`.
        heads, expansion, dropout: of its one decoder layer.
    """

    table_parameters: ClassVar[tuple[str, ...]] = ("slots",)

    def __init__(
        self, slots: int, width: int, heads: int, *, expansion: int = 4, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.slots = nn.Parameter(torch.randn(slots, width) * 0.5)
        self.norm = nn.LayerNorm(width)
        self.layer = pre_norm_decoder_layer(width, heads, expansion=expansion, dropout=dropout)

    def forward(self, states_BMW: Tensor) -> Tensor:
        """States `[B, slots, width]` of states `[B, M, width]`."""
        slots_BPW = self.slots.expand(len(states_BMW), -1, -1)
        made: Tensor = self.layer(slots_BPW, self.norm(states_BMW))
        return made


def check_heads(heads: int, lm: StatesFacts) -> None:
    """Raise unless the width of what a pooler reads divides among its attention heads.

    Raises:
        ConfigError: it does not.
    """
    require(
        lm.width % heads == 0,
        f"encoder.pooler.heads={heads} does not divide the width {lm.width} of {lm.source!r}",
    )
