"""Learned queries that read the hidden states of several of an LM's layers.

All of the text reaches every latent, and the LM runs over the text alone: with a frozen LM its
states can be kept (`objectives/frozen_cache.py`). Keys and values of a reader's layer are linear in
what stands before that layer, so a deep prefix wants more than the last layer's states.

Shapes: B texts, T positions, D the LM's width, M latents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentwire_fast.config.base import require
from latentwire_fast.config.schema import PoolerConfig
from latentwire_fast.models.lm_text import LMFacts, LMText
from latentwire_fast.models.poolers.base import Pooler
from latentwire_fast.models.poolers.spans import span_weights


class CrossAttentionPooler(Pooler):
    """M queries over the text's states. Query k starts from the mean of the k-th of M spans of the
    text, so that each has a part of the text to begin with, and none is left out."""

    @dataclass(frozen=True)
    class Config(PoolerConfig):
        """Queries that read several layers' states of a text.

        Attributes:
            states: of how many of the LM's layers, evenly from its embeddings to its last.
            layers, heads: of the transformer between states and latents.
            expansion: inner width of its MLPs, as a multiple of its width.
            dropout: in it.
        """

        states: int = 6
        layers: int = 2
        heads: int = 8
        expansion: int = 2
        dropout: float = 0.0

        def __post_init__(self) -> None:
            super().__post_init__()
            self.at_least_one("states", "layers", "heads", "expansion")
            require(0 <= self.dropout < 1, f"dropout={self.dropout}, expected in [0, 1)")

    table_parameters: ClassVar[tuple[str, ...]] = ("slots",)

    def __init__(self, config: Config, lm: LMFacts) -> None:
        super().__init__(config, lm)
        require(
            lm.width % config.heads == 0,
            f"encoder.pooler.heads={config.heads} does not divide the width {lm.width} of "
            f"{lm.source!r}",
        )
        self.latents = lm.latents
        self.state_layers = spread(lm.layers + 1, config.states)
        self.mixes = nn.ModuleList(
            nn.Linear(lm.width, lm.width, bias=False) for _ in self.state_layers
        )
        self.slots = nn.Parameter(torch.randn(lm.latents, lm.width) * 0.02)
        shape = (lm.width, config.heads, config.expansion * lm.width)
        self.body = nn.ModuleList(
            nn.TransformerDecoderLayer(
                *shape,
                dropout=config.dropout,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(lm.width)

    @property
    def states(self) -> int:
        """Those of its layers."""
        return len(self.state_layers)

    def forward(self, text: LMText) -> Tensor:
        """States `[B, M, D]`."""
        states, is_text_BT = text.layers(self.state_layers)
        normed = (F.layer_norm(h.float(), h.shape[-1:]) for h in states)
        mixed = [mix(h) for mix, h in zip(self.mixes, normed, strict=True)]
        memory_BTD = self.norm(torch.stack(mixed).sum(0))
        queries_BMD = span_weights(is_text_BT, self.latents) @ memory_BTD + self.slots
        for layer in self.body:
            queries_BMD = layer(queries_BMD, memory_BTD, memory_key_padding_mask=~is_text_BT)
        return queries_BMD


def spread(count: int, chosen: int) -> tuple[int, ...]:
    """At most `chosen` of `count` numbers from 0 on, evenly spread, the first and the last too."""
    if chosen == 1:
        return (count - 1,)
    return tuple(sorted({round(i * (count - 1) / (chosen - 1)) for i in range(chosen)}))
