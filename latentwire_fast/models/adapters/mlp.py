"""A residual two-layer MLP at the reader's width."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from latentwire_fast.config.base import require
from latentwire_fast.config.schema import AdapterConfig
from latentwire_fast.models.adapters.base import Adapter


class MLPAdapter(Adapter):
    """Each latent lifted to the reader's width, with a learned bias per slot, and an MLP added."""

    @dataclass(frozen=True)
    class Config(AdapterConfig):
        """A residual two-layer MLP at the reader's width.

        Attributes:
            expansion: its inner width as a multiple of the reader's.
            dropout: of what it adds.
        """

        expansion: int = 4
        dropout: float = 0.0

        def __post_init__(self) -> None:
            super().__post_init__()
            self.at_least_one("expansion")
            require(0 <= self.dropout < 1, f"dropout={self.dropout}, expected in [0, 1)")

    table_parameters: ClassVar[tuple[str, ...]] = ("slots",)

    def __init__(self, config: Config, *, latents: int, d_z: int, d_model: int) -> None:
        super().__init__(config, latents=latents, d_z=d_z, d_model=d_model)
        self.lift = nn.Linear(d_z, d_model)
        self.slots = nn.Parameter(torch.randn(latents, d_model) * 0.02)
        self.up = nn.Linear(d_model, config.expansion * d_model)
        self.down = nn.Linear(config.expansion * d_model, d_model)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, latent_BMd: Tensor) -> Tensor:
        """Rows `[B, M, D]`."""
        lifted_BMD = self.lift(latent_BMd) + self.slots[: latent_BMd.shape[1]]
        inner = nn.functional.silu(self.up(lifted_BMD))
        return lifted_BMD + self.dropout(self.down(inner))

    def first_projection(self) -> Tensor:
        """The identity, `[D, D]`."""
        return torch.eye(len(self.lift.weight))
