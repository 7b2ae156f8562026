"""A text made shorter in several stages, each of which reads all of the one before it.

Shapes: B texts, T positions, N positions behind a stage, M latents, D the encoder's width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from latentwire_fast.config.base import require
from latentwire_fast.config.schema import PoolerConfig
from latentwire_fast.models.layers import check_heads, pre_norm_decoder_layer
from latentwire_fast.models.poolers.base import Pooler
from latentwire_fast.models.poolers.spans import span_weights
from latentwire_fast.models.token_states import StatesFacts, TokenStates


class HierarchicalPooler(Pooler):
    """S stages to factor^(S - 1) M, ..., factor M, and M positions. In each, a query begins as the
    mean of its span of the stage before, sees the other queries, and reads all of that stage."""

    @dataclass(frozen=True)
    class Config(PoolerConfig):
        """Gradual pooling.

        Attributes:
            stages: how many there are.
            factor: how many times shorter a stage is than the one before it.
            heads: of the stages' attention.
            expansion: inner width of their MLPs, as a multiple of their width.
            dropout: in them.
        """

        stages: int = 3
        factor: int = 2
        heads: int = 8
        expansion: int = 2
        dropout: float = 0.0

        def __post_init__(self) -> None:
            super().__post_init__()
            self.at_least_one("stages", "heads", "expansion")
            require(self.factor >= 2, f"factor={self.factor}, expected at least 2")
            require(0 <= self.dropout < 1, f"dropout={self.dropout}, expected in [0, 1)")

    def __init__(self, config: Config, lm: StatesFacts) -> None:
        super().__init__(config, lm)
        check_heads(config.heads, lm)
        steps = range(config.stages - 1, -1, -1)
        self.lengths = [lm.latents * config.factor**step for step in steps]
        self.norm = nn.LayerNorm(lm.width)
        self.stages = nn.ModuleList(
            pre_norm_decoder_layer(
                lm.width, config.heads, expansion=config.expansion, dropout=config.dropout
            )
            for _ in self.lengths
        )

    @property
    def states(self) -> int:
        """The last layer's."""
        return 1

    def forward(self, text: TokenStates) -> Tensor:
        """States `[B, M, D]`."""
        hidden_BTD, inside_BT = text.last()
        states_BTD = self.norm(F.layer_norm(hidden_BTD.float(), hidden_BTD.shape[-1:]))
        for length, stage in zip(self.lengths, self.stages, strict=True):
            queries_BND = span_weights(inside_BT, length) @ states_BTD
            states_BTD = stage(queries_BND, states_BTD, memory_key_padding_mask=~inside_BT)
            inside_BT = inside_BT.new_ones(states_BTD.shape[:2])  # no stage has padding of its own
        return states_BTD
