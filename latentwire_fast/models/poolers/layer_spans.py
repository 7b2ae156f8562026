"""Means over spans of several of an LM's layers, mixed and then compared by a transformer.

All of the text reaches the latents at a small cost: what is trained runs over M positions, not
over the text's.

Shapes: B texts, T positions, K parts of spans, C channels of the layers that are read, M latents,
D the LM's width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentwire_fast.models.layers import pre_norm_layer
from latentwire_fast.models.poolers.layer_states import LayerStatesPooler
from latentwire_fast.models.poolers.spans import span_weights
from latentwire_fast.models.token_states import StatesFacts, TokenStates


class LayerSpansPooler(LayerStatesPooler):
    """Latent k sees the k-th of M spans of the text, in several parts and several layers; then a
    transformer over the latents lets each see the others."""

    @dataclass(frozen=True)
    class Config(LayerStatesPooler.Config):
        """Spans of several layers' states; the transformer is over the latents.

        Attributes:
            parts: into how many a span is cut before its means are taken.
        """

        parts: int = 2

        def __post_init__(self) -> None:
            super().__post_init__()
            self.at_least_one("parts")

    varies = True

    def __init__(self, config: Config, lm: StatesFacts) -> None:
        super().__init__(config, lm)
        self.parts = config.parts
        width = len(self.state_layers) * config.parts * lm.width
        self.mix = nn.Linear(width, lm.width)
        nn.init.normal_(self.mix.weight, std=width**-0.5)
        self.slots = nn.Parameter(torch.randn(lm.latents, lm.width) * 0.02)
        self.body = nn.TransformerEncoder(
            pre_norm_layer(
                lm.width, config.heads, expansion=config.expansion, dropout=config.dropout
            ),
            config.layers,
            enable_nested_tensor=False,
        )

    def forward(self, text: TokenStates) -> Tensor:
        """States `[B, M, D]`."""
        states, is_text_BT = text.layers(self.state_layers)
        counts_B = None if text.counts_B is None else text.counts_B * self.parts
        weights_BKT = span_weights(is_text_BT, self.latents * self.parts, counts_B=counts_B)
        means = [weights_BKT @ F.layer_norm(h.float(), h.shape[-1:]) for h in states]
        means_BKC = torch.cat(means, -1)
        mixed_BMD = self.mix(means_BKC.unflatten(1, (self.latents, self.parts)).flatten(2))
        absent_BM = text.absent_BM(self.latents)
        pooled: Tensor = self.body(mixed_BMD + self.slots, src_key_padding_mask=absent_BM)
        return pooled
