"""Pool, expand, reconstruct: a second pooling looks for what the first has lost.

The seed's form trains the expanded states to be those of the text, and then sends what was never
trained to be read. Here the reconstruction is part of the pooler: what it cannot rebuild is what
the latents still lack, and it is pooled once more.

Shapes: B texts, T positions, M latents, D the encoder's width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentwire_fast.config.schema import PoolerConfig
from latentwire_fast.models.layers import check_heads, pre_norm_decoder_layer
from latentwire_fast.models.poolers.base import Pooler
from latentwire_fast.models.poolers.gated_queries import sinusoids
from latentwire_fast.models.poolers.spans import span_weights
from latentwire_fast.models.token_states import StatesFacts, TokenStates


class PoolExpandPooler(Pooler):
    """Means over M spans; each mean rebuilds the states of its span, of which it knows the order;
    queries then read the difference to what was there, and add it."""

    @dataclass(frozen=True)
    class Config(PoolerConfig):
        """Pool, expand, reconstruct.

        Attributes:
            heads: of the attention to what was not rebuilt.
            expansion: inner width of the MLPs, as a multiple of their width.
        """

        heads: int = 8
        expansion: int = 2

        def __post_init__(self) -> None:
            super().__post_init__()
            self.at_least_one("heads", "expansion")

    table_parameters: ClassVar[tuple[str, ...]] = ("slots",)

    def __init__(self, config: Config, lm: StatesFacts) -> None:
        super().__init__(config, lm)
        check_heads(config.heads, lm)
        self.slots = nn.Parameter(torch.randn(lm.latents, lm.width) * 0.02)
        inner = config.expansion * lm.width
        self.rebuild = nn.Sequential(
            nn.Linear(lm.width, inner), nn.GELU(), nn.Linear(inner, lm.width)
        )
        self.read = pre_norm_decoder_layer(lm.width, config.heads, expansion=config.expansion)

    @property
    def states(self) -> int:
        """The last layer's."""
        return 1

    def forward(self, text: TokenStates) -> Tensor:
        """States `[B, M, D]`."""
        hidden_BTD, is_text_BT = text.last()
        states_BTD = F.layer_norm(hidden_BTD.float(), hidden_BTD.shape[-1:])
        weights_BMT = span_weights(is_text_BT, len(self.slots))
        pooled_BMD = weights_BMT @ states_BTD
        lost_BTD = states_BTD - self.expand(pooled_BMD, weights_BMT)
        read_BMD: Tensor = self.read(
            pooled_BMD + self.slots, lost_BTD, memory_key_padding_mask=~is_text_BT
        )
        return read_BMD

    def expand(self, pooled_BMD: Tensor, weights_BMT: Tensor) -> Tensor:
        """States `[B, T, D]` rebuilt from those of M spans, and from where in its span a position
        stands."""
        inside_BMT = weights_BMT > 0
        number_BMT = (inside_BMT.cumsum(-1) - 1) * inside_BMT  # of each position in its span
        share_BTM = inside_BMT.transpose(1, 2) / inside_BMT.sum(1).clamp(min=1)[..., None]
        table_TD = sinusoids(inside_BMT.shape[-1], pooled_BMD.shape[-1]).to(pooled_BMD)
        copies_BTD = share_BTM @ pooled_BMD + table_TD[number_BMT.amax(1)]
        rebuilt_BTD: Tensor = self.rebuild(copies_BTD)
        return rebuilt_BTD
