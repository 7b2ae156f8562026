"""No adapter but the projection itself, behind a LayerNorm."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from latentwire_fast.config.schema import AdapterConfig
from latentwire_fast.models.adapters.base import Adapter


class LinearAdapter(Adapter):
    """The latent as it is; LayerNorm and projection are one operation on a payload's codes."""

    @dataclass(frozen=True)
    class Config(AdapterConfig):
        """LayerNorm and projection; there is nothing to set."""

    keeps_latent = True

    def __init__(self, config: Config, *, latents: int, d_z: int, d_model: int) -> None:
        super().__init__(config, latents=latents, d_z=d_z, d_model=d_model)
        self.norm = nn.LayerNorm(d_z)
        self._shape = (d_model, d_z)

    def forward(self, latent_BMd: Tensor) -> Tensor:
        """The latent."""
        return latent_BMd

    def first_projection(self) -> Tensor:
        """Random rows of length about 1, `[D, d_z]`."""
        return torch.randn(self._shape) * self._shape[1] ** -0.5
