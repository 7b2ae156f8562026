"""Feature-wise linear modulation (FiLM, arXiv:1709.07871) of each slot at the reader's width."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from latentwire_fast.config.schema import AdapterConfig
from latentwire_fast.models.adapters.base import Adapter


class FiLMAdapter(Adapter):
    """Each latent lifted to the reader's width, then scaled and shifted channel by channel.

    The scale and the shift of a slot are a learned row of its own plus a linear map of its latent.
    Both begin at nothing: a fresh adapter is the lift with its bias per slot.
    """

    @dataclass(frozen=True)
    class Config(AdapterConfig):
        """A scale and a shift per slot and channel, which the latent changes; nothing to set."""

    table_parameters: ClassVar[tuple[str, ...]] = ("slots", "modulation")

    def __init__(self, config: Config, *, latents: int, d_z: int, d_model: int) -> None:
        super().__init__(config, latents=latents, d_z=d_z, d_model=d_model)
        self.lift = nn.Linear(d_z, d_model)
        self.slots = nn.Parameter(torch.randn(latents, d_model) * 0.02)
        self.modulation = nn.Parameter(torch.zeros(latents, 2 * d_model))
        self.condition = nn.Linear(d_z, 2 * d_model, bias=False)
        nn.init.zeros_(self.condition.weight)

    def forward(self, latent_BMd: Tensor) -> Tensor:
        """Rows `[B, M, D]`."""
        latents = latent_BMd.shape[1]
        lifted_BMD = self.lift(latent_BMd) + self.slots[:latents]
        scale_BMD, shift_BMD = self.modulation_of(latent_BMd).chunk(2, -1)
        return lifted_BMD * (1 + scale_BMD) + shift_BMD

    def modulation_of(self, latent_BMd: Tensor) -> Tensor:
        """Scales and shifts `[B, M, 2 D]`."""
        modulation: Tensor = self.modulation[: latent_BMd.shape[1]] + self.condition(latent_BMd)
        return modulation

    def first_projection(self) -> Tensor:
        """The identity, `[D, D]`."""
        return torch.eye(len(self.lift.weight))
