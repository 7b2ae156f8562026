"""No adapter but the projection itself, behind a LayerNorm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from latentwire_fast.config.schema import AdapterConfig
from latentwire_fast.models.adapters.base import Adapter


class LinearAdapter(Adapter):
    """The latent as it is, or with a learned vector per slot added.

    Without these, LayerNorm and projection are one operation on a payload's codes.
    """

    @dataclass(frozen=True)
    class Config(AdapterConfig):
        """LayerNorm and projection.

        Attributes:
            positions: add a learned vector per slot to the latents first: one projection for all
                slots then knows which of them it has.
        """

        positions: bool = False

    table_parameters: ClassVar[tuple[str, ...]] = ("slots",)
    slots: nn.Parameter | None

    def __init__(self, config: Config, *, latents: int, d_z: int, d_model: int) -> None:
        super().__init__(config, latents=latents, d_z=d_z, d_model=d_model)
        self.norm = nn.LayerNorm(d_z)
        self.keeps_latent = not config.positions
        # Encoders write latents of RMS 1: a tenth of that is seen, and hides nothing.
        first_Md = torch.randn(latents, d_z) * 0.1 if config.positions else None
        self.slots = None if first_Md is None else nn.Parameter(first_Md)
        self._shape = (d_model, d_z)

    def forward(self, latent_BMd: Tensor) -> Tensor:
        """The latent `[B, M, d_z]`, with the vectors of its slots."""
        if self.slots is None:
            return latent_BMd
        return latent_BMd + self.slots[: latent_BMd.shape[1]]

    def first_projection(self) -> Tensor:
        """Random rows of length about 1, `[D, d_z]`."""
        return torch.randn(self._shape) * self._shape[1] ** -0.5
