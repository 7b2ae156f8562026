"""Means over spans of several of an LM's layers, mixed and then compared by a transformer.

All of the text reaches the latents at a small cost: what is trained runs over M positions, not
over the text's. With a frozen LM its states can be kept (`training/frozen_work.py`).

Shapes: B texts, T positions, K parts of spans, C channels of the layers that are read, M latents,
D the LM's width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentwire_fast.config.base import require
from latentwire_fast.config.schema import PoolerConfig
from latentwire_fast.models.layers import pre_norm_layer
from latentwire_fast.models.lm_text import LMFacts, LMText
from latentwire_fast.models.poolers.base import Pooler
from latentwire_fast.models.poolers.cross_attention import spread
from latentwire_fast.models.poolers.spans import span_weights


class LayerSpansPooler(Pooler):
    """Latent k sees the k-th of M spans of the text, in several parts and several layers; then a
    transformer over the latents lets each see the others."""

    @dataclass(frozen=True)
    class Config(PoolerConfig):
        """Spans of several layers' states.

        Attributes:
            states: of how many of the LM's layers, evenly from its embeddings to its last.
            parts: into how many a span is cut before its means are taken.
            layers, heads: of the transformer over the latents.
            expansion: inner width of its MLPs, as a multiple of its width.
            dropout: in it.
        """

        states: int = 6
        parts: int = 2
        layers: int = 2
        heads: int = 8
        expansion: int = 2
        dropout: float = 0.0

        def __post_init__(self) -> None:
            super().__post_init__()
            self.at_least_one("states", "parts", "layers", "heads", "expansion")
            require(0 <= self.dropout < 1, f"dropout={self.dropout}, expected in [0, 1)")

    table_parameters: ClassVar[tuple[str, ...]] = ("slots",)

    def __init__(self, config: Config, lm: LMFacts) -> None:
        super().__init__(config, lm)
        require(
            lm.width % config.heads == 0,
            f"encoder.pooler.heads={config.heads} does not divide the width {lm.width} of "
            f"{lm.source!r}",
        )
        self.latents, self.parts = lm.latents, config.parts
        self.state_layers = spread(lm.layers + 1, config.states)
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

    @property
    def states(self) -> int:
        """Those of its layers."""
        return len(self.state_layers)

    def forward(self, text: LMText) -> Tensor:
        """States `[B, M, D]`."""
        states, is_text_BT = text.layers(self.state_layers)
        weights_BKT = span_weights(is_text_BT, self.latents * self.parts)
        means = [weights_BKT @ F.layer_norm(h.float(), h.shape[-1:]) for h in states]
        means_BKC = torch.cat(means, -1)
        mixed_BMD = self.mix(means_BKC.unflatten(1, (self.latents, self.parts)).flatten(2))
        pooled: Tensor = self.body(mixed_BMD + self.slots)
        return pooled
