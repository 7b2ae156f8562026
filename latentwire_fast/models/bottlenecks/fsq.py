"""Finite scalar quantisation: every channel is rounded to a few levels, and there is no codebook.

Shapes: B texts, M latents, d latent width, N = M * d symbols.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentwire_fast.config.base import require
from latentwire_fast.models.bottlenecks.alphabet import Alphabet, require_codes
from latentwire_fast.models.bottlenecks.gradients import pass_gradient
from latentwire_fast.models.bottlenecks.symbol_config import SymbolConfig
from latentwire_fast.models.bottlenecks.symbols import SymbolBottleneck
from latentwire_fast.reference import bounded, level_values


class FiniteScalars(SymbolBottleneck):
    """Levels of channels (FSQ, arXiv:2309.15505). No scales are sent, and nothing can collapse."""

    @dataclass(frozen=True)
    class Config(SymbolConfig):
        """Levels of channels.

        Attributes:
            bits: per channel: as many as the largest number of levels needs.
            levels: of the channels, in turn: (8, 5) gives every second channel 5. None given: all
                2 ** bits.
        """

        bits: int = 3
        levels: tuple[int, ...] = ()

        def __post_init__(self) -> None:
            super().__post_init__()
            for count in self.levels:
                require_codes("levels", count)
            wanted = (max(self.levels) - 1).bit_length() if self.levels else self.bits
            require(
                self.bits == wanted and 1 <= self.bits <= 8,
                f"bits={self.bits}, expected {wanted if self.levels else '1 to 8'}"
                + (f": the largest of levels={self.levels} needs as many" if self.levels else ""),
            )

        @property
        def rates(self) -> tuple[int, ...]:
            """The one width that is sent."""
            return (self.bits,)

    config: Config
    has_soft_symbols = True

    def __init__(self, config: Config, *, latents: int, d_z: int) -> None:
        super().__init__(config, latents=latents, d_z=d_z)
        counts = torch.from_numpy(self._counts(d_z))
        self.register_buffer("counts_d", counts, persistent=False)
        self.counts_d: Tensor

    def _counts(self, channels: int) -> np.ndarray:
        return np.resize(self.config.levels or [2**self.config.bits], channels).astype(np.int64)

    def forward(self, latent_BMd: Tensor, bits: int) -> Tensor:
        """The levels' values; gradients pass straight through the rounding, and through tanh."""
        half_d = (self.counts_d // 2).float()
        smooth_BMd = bounded(latent_BMd.float(), self.counts_d) / half_d
        symbols_BMd = self._levels(latent_BMd)
        return pass_gradient(smooth_BMd, level_values(symbols_BMd, self.counts_d), "straight")

    def _levels(self, latent_BMd: Tensor) -> Tensor:
        """Levels `[B, M, d]` from 0 to L - 1."""
        levels_BMd = bounded(latent_BMd.detach().float(), self.counts_d).round().long()
        return levels_BMd + self.counts_d // 2

    def alphabet(self, bits: int) -> Alphabet:
        """A symbol per value, whose kind is its channel."""
        sizes_N = np.tile(self._counts(self.d_z), self.latents)
        return Alphabet(sizes_N, np.tile(np.arange(self.d_z), self.latents))

    def symbols(self, latent_BMd: Tensor, bits: int) -> Tensor:
        """The levels, row by row."""
        return self._levels(latent_BMd).flatten(1)

    def soft_symbols(self, latent_BMd: Tensor, bits: int) -> Tensor:
        """The levels before they are rounded."""
        return (bounded(latent_BMd, self.counts_d) + self.counts_d // 2).flatten(1)

    def values(self, symbols_BN: Tensor, bits: int, latents: int) -> Tensor:
        """The latents `[B, M, d]` that levels stand for."""
        levels_BMd = symbols_BN.reshape(len(symbols_BN), latents, self.d_z)
        return level_values(levels_BMd, self.counts_d)

    def describe(self, latent_BMd: Tensor) -> dict[str, Any]:
        """Usage and perplexity, the means over the channels."""
        of_channels = list(super().describe(latent_BMd).values())
        names = of_channels[0]
        mean = {name: sum(c[name] for c in of_channels) / len(of_channels) for name in names}
        return {"channel": mean}

    def format_facts(self) -> list[Any]:
        """The symbols, and the levels."""
        return [*super().format_facts(), list(self.config.levels)]
