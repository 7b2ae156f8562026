"""The base class of adapters.

Shapes: B batch, M latents, d the latent's width, D the reader's.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from latentwire_fast.config.schema import AdapterConfig


class Adapter(nn.Module):
    """Latents `[B, M, d]` to the rows that `SoftPrompt` projects into a reader's embeddings.

    Args:
        config: its settings.
        latents: M, the number of slots.
        d_z: width d of the latent.
        d_model: width D of the reader's embeddings.

    Attributes:
        norm: a LayerNorm that the projection begins with, in one kernel; None without one.
        keeps_latent: whether the rows are the latent as it is, so that a payload's codes can be
            projected without it.
    """

    Config: ClassVar[type[AdapterConfig]] = AdapterConfig
    norm: nn.LayerNorm | None
    keeps_latent: bool = False

    def __init__(self, config: AdapterConfig, *, latents: int, d_z: int, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.norm = None

    def forward(self, latent_BMd: Tensor) -> Tensor:
        """Rows `[B, M, width]`."""
        raise NotImplementedError

    def first_projection(self) -> Tensor:
        """The weight `[D, width]` that the projection of the rows starts from."""
        raise NotImplementedError
