"""A soft codebook: each latent becomes a mixture of learned codes, sent as `uniform` sends it.

Shapes: B texts, M latents, d latent width, K codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from latentwire_fast.config.base import require
from latentwire_fast.models.bottlenecks.alphabet import require_codes
from latentwire_fast.models.bottlenecks.uniform import UniformQuantizer


class SoftCodebook(UniformQuantizer):
    """Mixtures of codes: a control for codebooks, without the choice of one code. It saves no
    bytes: the mixtures are values like any others."""

    table_parameters: ClassVar[tuple[str, ...]] = ("codes_Kd",)

    @dataclass(frozen=True)
    class Config(UniformQuantizer.Config):
        """Mixtures of codes.

        Attributes:
            codes: K.
            temperature: of the softmax over minus half the squared distances, per channel.
        """

        codes: int = 512
        temperature: float = 0.1

        def __post_init__(self) -> None:
            super().__post_init__()
            require_codes("codes", self.codes)
            require(self.temperature > 0, f"temperature={self.temperature}, expected above 0")

    config: Config

    def __init__(self, config: Config, *, latents: int, d_z: int) -> None:
        super().__init__(config, latents=latents, d_z=d_z)
        self.codes_Kd = nn.Parameter(torch.randn(config.codes, d_z))

    def mixed(self, latent_BMd: Tensor) -> Tensor:
        """The mixtures `[B, M, d]`: the nearer a code, the more of it."""
        return self._weights(latent_BMd) @ self.codes_Kd.float()

    def _weights(self, latent_BMd: Tensor) -> Tensor:
        """Shares `[B, M, K]`; `|z|^2` is the same for all codes and left out."""
        codes_Kd = self.codes_Kd.float()
        with torch.autocast(latent_BMd.device.type, enabled=False):
            near_BMK = latent_BMd.float() @ codes_Kd.T - codes_Kd.square().sum(-1) / 2
            return (near_BMK / (self.config.temperature * codes_Kd.shape[1])).softmax(-1)

    def forward(self, latent_BMd: Tensor, bits: int) -> Tensor:
        """The mixtures as the receiver gets them; gradients pass straight through the rounding."""
        return super().forward(self.mixed(latent_BMd), bits)

    def pack(self, latent_BMd: Tensor, *, bits: int, fingerprint: int) -> list[bytes]:
        """One payload per latent, of its mixtures.

        Raises:
            PayloadError: as `UniformQuantizer.pack`.
        """
        self.check_latents(latent_BMd, bits)
        with torch.no_grad():
            mixed_BMd = self.mixed(latent_BMd)
        return super().pack(mixed_BMd, bits=bits, fingerprint=fingerprint)

    def rate(self, latent_BMd: Tensor, bits: int) -> Tensor:
        """By text, the bits of its mixtures' symbols under what has come so far."""
        return super().rate(self.mixed(latent_BMd), bits)

    def learn(self, latent_BMd: Tensor, bits: int) -> None:
        """Count the symbols of a step's mixtures."""
        with torch.no_grad():
            super().learn(self.mixed(latent_BMd), bits)

    def fit(self, latents: Sequence[Tensor]) -> None:
        """Learn how often each symbol of the mixtures comes."""
        with torch.no_grad():
            super().fit([self.mixed(latent_BMd) for latent_BMd in latents])

    @torch.no_grad()
    def describe(self, latent_BMd: Tensor) -> dict[str, Any]:
        """The perplexity of a latent's mixture, and that of all together."""
        weights_NK = self._weights(latent_BMd).flatten(0, 1)

        def perplexity(shares: Tensor) -> float:
            return float(torch.special.entr(shares).sum(-1).exp().mean())

        of_all = perplexity(weights_NK.mean(0))
        return {"codes": {"perplexity": of_all, "of_a_latent": perplexity(weights_NK)}}
