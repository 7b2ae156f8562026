"""Learned queries that read the hidden states of several of an LM's layers.

All of the text reaches every latent.

Shapes: B texts, T positions, D the LM's width, M latents.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentwire_fast.models.layers import pre_norm_decoder_layer
from latentwire_fast.models.poolers.layer_states import LayerStatesPooler
from latentwire_fast.models.poolers.spans import span_weights
from latentwire_fast.models.token_states import StatesFacts, TokenStates


class CrossAttentionPooler(LayerStatesPooler):
    """M queries over the text's states. Query k starts from the mean of the k-th of M spans of the
    text, so that each has a part of the text to begin with, and none is left out."""

    @dataclass(frozen=True)
    class Config(LayerStatesPooler.Config):
        """Queries that read several layers' states of a text; nothing else to set."""

    varies = True

    def __init__(self, config: Config, lm: StatesFacts) -> None:
        super().__init__(config, lm)
        self.mixes = nn.ModuleList(
            nn.Linear(lm.width, lm.width, bias=False) for _ in self.state_layers
        )
        self.slots = nn.Parameter(torch.randn(lm.latents, lm.width) * 0.02)
        self.body = nn.ModuleList(
            pre_norm_decoder_layer(
                lm.width, config.heads, expansion=config.expansion, dropout=config.dropout
            )
            for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(lm.width)

    def forward(self, text: TokenStates) -> Tensor:
        """States `[B, M, D]`."""
        states, is_text_BT = text.layers(self.state_layers)
        normed = (F.layer_norm(h.float(), h.shape[-1:]) for h in states)
        mixed = [mix(h) for mix, h in zip(self.mixes, normed, strict=True)]
        memory_BTD = self.norm(torch.stack(mixed).sum(0))
        weights_BMT = span_weights(is_text_BT, self.latents, counts_B=text.counts_B)
        queries_BMD = weights_BMT @ memory_BTD + self.slots
        absent_BM = text.absent_BM(self.latents)
        for layer in self.body:
            queries_BMD = layer(
                queries_BMD,
                memory_BTD,
                tgt_key_padding_mask=absent_BM,
                memory_key_padding_mask=~is_text_BT,
            )
        return queries_BMD
