"""A transformer over the latents of another pooler.

Shapes: B texts, M latents, D the encoder's width.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from latentwire_fast.config.base import require
from latentwire_fast.config.schema import PoolerConfig, RunConfig
from latentwire_fast.models.layers import check_heads, pre_norm_layer
from latentwire_fast.models.poolers.base import Pooler, Selection
from latentwire_fast.models.token_states import StatesFacts, TokenStates
from latentwire_fast.registry import POOLERS


class RefinerPooler(Pooler):
    """Another pooler's states, after each of the M has seen the others."""

    @dataclass(frozen=True)
    class Config(PoolerConfig):
        """A refiner behind another pooler.

        Attributes:
            pooler: the one whose states are refined.
            layers, heads: of the transformer.
            expansion: inner width of its MLPs, as a multiple of its width.
            dropout: in it.
        """

        pooler: PoolerConfig = field(default_factory=lambda: POOLERS.config("spans"))
        layers: int = 2
        heads: int = 8
        expansion: int = 4
        dropout: float = 0.0

        def __post_init__(self) -> None:
            super().__post_init__()
            self.at_least_one("layers", "heads", "expansion")
            require(0 <= self.dropout < 1, f"dropout={self.dropout}, expected in [0, 1)")

        @property
        def selects_positions(self) -> bool:
            """Whether the other one does."""
            return self.pooler.selects_positions

        @property
        def needs_lm(self) -> bool:
            """Whether the other one does."""
            return self.pooler.needs_lm

        def check(self, run: RunConfig) -> None:
            """The other one checks itself."""
            self.pooler.check(run)

    table_parameters: ClassVar[tuple[str, ...]] = ("slots",)

    def __init__(self, config: Config, lm: StatesFacts) -> None:
        super().__init__(config, lm)
        check_heads(config.heads, lm)
        self.pooler: Pooler = POOLERS.part_of(config.pooler)(config.pooler, lm)
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
        """Those that the other one reads."""
        return self.pooler.states

    def forward(self, text: TokenStates) -> Tensor:
        """States `[B, M, D]`."""
        return self._refine(self.pooler(text))

    def select(self, text: TokenStates) -> Selection:
        """The positions that the other one chose, with refined states."""
        selection = self.pooler.select(text)
        return replace(selection, states_BMD=self._refine(selection.states_BMD))

    def _refine(self, states_BMD: Tensor) -> Tensor:
        refined: Tensor = self.body(states_BMD.float() + self.slots)
        return refined
