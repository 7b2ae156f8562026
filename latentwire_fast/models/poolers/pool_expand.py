"""Pool, expand, reconstruct: a second pooling looks for what the first has lost.

The seed's form trains the expanded states to be those of the text, and then sends the pooled ones,
which nothing had to read. Here the reconstruction is part of the pooler: the difference between it
and the text is exactly what the means lack, and it is pooled in its turn. No other loss is needed.

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
    """Means over M spans; each is put in the place of all states of its span; queries then read the
    difference to what was there, and where in its span it was, and add it to the means."""

    @dataclass(frozen=True)
    class Config(PoolerConfig):
        """Pool, expand, reconstruct.

        Attributes:
            heads: of the attention to the difference.
            expansion: inner width of the MLP behind it, as a multiple of its width.
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
        lost_BTD = states_BTD - expand(pooled_BMD, weights_BMT)
        places_TD = sinusoids(states_BTD.shape[1], states_BTD.shape[2]).to(states_BTD)
        read_BMD: Tensor = self.read(
            pooled_BMD + self.slots,
            lost_BTD + places_TD[number_in_span(weights_BMT)],
            memory_key_padding_mask=~is_text_BT,
        )
        return read_BMD


def expand(pooled_BMD: Tensor, weights_BMT: Tensor) -> Tensor:
    """States `[B, T, D]` of which each is that of its span (the mean of several where spans
    overlap), and zero outside the text."""
    in_span_BTM = (weights_BMT > 0).transpose(1, 2)
    return (in_span_BTM / in_span_BTM.sum(-1, keepdim=True).clamp(min=1)) @ pooled_BMD


def number_in_span(weights_BMT: Tensor) -> Tensor:
    """Which position of its span each one is `[B, T]`, from 0 on."""
    in_span_BMT = weights_BMT > 0
    return ((in_span_BMT.cumsum(-1) - 1) * in_span_BMT).amax(1)
