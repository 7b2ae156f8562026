"""Vector quantisation: one code per latent.

Shapes: B texts, M latents (as many symbols), d latent width, K codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from latentwire_fast.config.base import require
from latentwire_fast.config.schema import RunConfig
from latentwire_fast.models.bottlenecks.alphabet import Alphabet
from latentwire_fast.models.bottlenecks.base import Sent
from latentwire_fast.models.bottlenecks.codebook import Codebook, CodebookConfig
from latentwire_fast.models.bottlenecks.commitment import check_commitment
from latentwire_fast.models.bottlenecks.gradients import pass_gradient
from latentwire_fast.models.bottlenecks.symbols import SymbolBottleneck


class VectorQuantizer(SymbolBottleneck):
    """The nearest of K codes in the place of each latent (VQ-VAE, arXiv:1711.00937)."""

    @dataclass(frozen=True)
    class Config(CodebookConfig):
        """The nearest of K codes.

        Attributes:
            bits: of a code, one per latent: there are 2 ** bits codes.
        """

        bits: int = 9

        def __post_init__(self) -> None:
            super().__post_init__()
            require(1 <= self.bits <= 12, f"bits={self.bits}, expected 1 to 12")

        @property
        def rates(self) -> tuple[int, ...]:
            """The one width that is sent."""
            return (self.bits,)

        def check(self, run: RunConfig) -> None:
            """Raise unless a stage trains the codes."""
            check_commitment(self, run)

    config: Config

    def __init__(self, config: Config, *, latents: int, d_z: int) -> None:
        super().__init__(config, latents=latents, d_z=d_z)
        self.codebook = Codebook(config, 2**config.bits, d_z)

    def forward(self, latent_BMd: Tensor, bits: int) -> Tensor:
        """The nearest codes; gradients pass as `config.passing` says."""
        return self.send(latent_BMd, bits).latent_BMd

    def send(self, latent_BMd: Tensor, bits: int) -> Sent:
        """The nearest codes, and the distance to them."""
        latent_BMd = latent_BMd.float()
        chosen_BMd = self.codebook.codes_Kd[self.codebook.nearest(latent_BMd)]
        sent_BMd = pass_gradient(latent_BMd, chosen_BMd, self.config.passing)
        return Sent(sent_BMd, self.codebook.loss_B(latent_BMd, chosen_BMd))

    @property
    def learns(self) -> bool:
        """Its codes learn from each step."""
        return True

    def learn(self, latent_BMd: Tensor, bits: int) -> None:
        """Take in the latents of a step."""
        self.codebook.learn(latent_BMd.flatten(0, 1))

    def alphabet(self, bits: int) -> Alphabet:
        """One code per latent."""
        return Alphabet(np.full(self.latents, 2**self.config.bits), np.zeros(self.latents, int))

    def symbols(self, latent_BMd: Tensor, bits: int) -> Tensor:
        """The nearest codes `[B, M]`."""
        return self.codebook.nearest(latent_BMd.float())

    def values(self, symbols_BN: Tensor, bits: int, latents: int) -> Tensor:
        """The codes' vectors `[B, M, d]`."""
        codes_Kd = self.codebook.codes_Kd.detach()
        return codes_Kd[symbols_BN.to(codes_Kd.device)].to(symbols_BN.device)

    def format_tensors(self) -> dict[str, Tensor]:
        """The frequencies and the codes."""
        return super().format_tensors() | {"codes_Kd": self.codebook.codes_Kd.detach()}
