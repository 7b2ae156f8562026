"""Residual vector quantisation: a code per latent, then a code for what it missed, and so on.

Shapes: B texts, M latents, d latent width, K codes, S stages.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from latentwire_fast.config.base import require
from latentwire_fast.config.schema import RunConfig
from latentwire_fast.models.bottlenecks.alphabet import Alphabet
from latentwire_fast.models.bottlenecks.base import Sent
from latentwire_fast.models.bottlenecks.codebook import Codebook, CodebookConfig
from latentwire_fast.models.bottlenecks.commitment import check_commitment
from latentwire_fast.models.bottlenecks.gradients import pass_gradient
from latentwire_fast.models.bottlenecks.symbols import SymbolBottleneck


class ResidualVectorQuantizer(SymbolBottleneck):
    """A codebook per stage, each for the rest that the ones before leave (SoundStream,
    arXiv:2107.03312). Any number of stages can be sent: one model has several widths."""

    @dataclass(frozen=True)
    class Config(CodebookConfig):
        """A codebook per stage.

        Attributes:
            bits: of a latent: `code_bits` times the stages that are sent.
            code_bits: of a code: each stage has 2 ** code_bits.
            stages: how many codebooks there are.
            dropout: in training, the share of the texts that are sent with fewer stages, drawn
                evenly: so all widths are learned.
        """

        bits: int = 36
        code_bits: int = 9
        stages: int = 4
        dropout: float = 0.5

        def __post_init__(self) -> None:
            self.at_least_one("stages")
            require(1 <= self.code_bits <= 12, f"code_bits={self.code_bits}, expected 1 to 12")
            require(0 <= self.dropout <= 1, f"dropout={self.dropout}, expected 0 to 1")
            super().__post_init__()

        @property
        def rates(self) -> tuple[int, ...]:
            """The widths of all stages, of all but one, and so on."""
            return tuple(self.code_bits * stages for stages in range(self.stages, 0, -1))

        def check(self, run: RunConfig) -> None:
            """Raise unless a stage trains the codes."""
            check_commitment(self, run)

    config: Config

    def __init__(self, config: Config, *, latents: int, d_z: int) -> None:
        super().__init__(config, latents=latents, d_z=d_z)
        codes = 2**config.code_bits
        self.codebooks = nn.ModuleList(Codebook(config, codes, d_z) for _ in range(config.stages))

    def _stages(self, bits: int) -> list[Codebook]:
        """The codebooks that are used at this width."""
        books = [book for book in self.codebooks if isinstance(book, Codebook)]
        return books[: bits // self.config.code_bits]

    def forward(self, latent_BMd: Tensor, bits: int) -> Tensor:
        """The sums of the stages' codes; gradients pass as `config.passing` says."""
        return self.send(latent_BMd, bits).latent_BMd

    def send(self, latent_BMd: Tensor, bits: int) -> Sent:
        """The sums of the stages' codes, and the stages' distances to what they stand for."""
        latent_BMd = latent_BMd.float()
        books = self._stages(bits)
        counts_B = self._drawn_counts(latent_BMd, len(books))
        sum_BMd, loss_B = torch.zeros_like(latent_BMd), latent_BMd.new_zeros(len(latent_BMd))
        for stage, book in enumerate(books):
            rest_BMd = latent_BMd - sum_BMd.detach()
            chosen_BMd = book.codes_Kd[book.nearest(rest_BMd)]
            used_B = (counts_B > stage).to(latent_BMd)
            loss_B = loss_B + used_B * book.loss_B(rest_BMd, chosen_BMd)
            sum_BMd = sum_BMd + used_B[:, None, None] * chosen_BMd
        return Sent(pass_gradient(latent_BMd, sum_BMd, self.config.passing), loss_B)

    def _drawn_counts(self, latent_BMd: Tensor, stages: int) -> Tensor:
        """How many stages each text is sent with: all, but for some texts in training."""
        shape, device = (len(latent_BMd),), latent_BMd.device
        counts_B = torch.full(shape, stages, device=device)
        if not (self.training and self.config.dropout):
            return counts_B
        drawn_B = torch.randint(1, stages + 1, shape, device=device)
        is_drawn_B = torch.rand(shape, device=device) < self.config.dropout
        return torch.where(is_drawn_B, drawn_B, counts_B)

    @property
    def learns(self) -> bool:
        """Its codes learn from each step."""
        return True

    @torch.no_grad()
    def learn(self, latent_BMd: Tensor, bits: int) -> None:
        """Take in the latents of a step, each stage the rest that the ones before leave."""
        rest_Nd = latent_BMd.flatten(0, 1).float()
        for book in self._stages(bits):
            chosen_N = book.learn(rest_Nd)
            rest_Nd = rest_Nd - book.codes_Kd[chosen_N].to(rest_Nd)

    # --- symbols: the codes of all stages of a latent, then those of the next ---------------------

    def alphabet(self, bits: int) -> Alphabet:
        """A code per latent and stage, whose kind is the stage; the same at all widths."""
        stages = self.config.stages
        sizes_N = np.full(self.latents * stages, 2**self.config.code_bits)
        return Alphabet(sizes_N, np.tile(np.arange(stages), self.latents))

    def places(self, bits: int, latents: int) -> np.ndarray:
        """The first stages of the first rows."""
        sent = np.arange(bits // self.config.code_bits)
        return (np.arange(latents)[:, None] * self.config.stages + sent).reshape(-1)

    @property
    def prior_bits(self) -> int:
        """The width that the frequencies are learned at: that of all stages."""
        return self.config.rates[0]

    def is_fitted_at(self, bits: int) -> bool:
        """A stage's frequencies are the same at all widths."""
        return self.has_prior

    def symbols(self, latent_BMd: Tensor, bits: int) -> Tensor:
        """The codes `[B, M * S]`."""
        rest_BMd, found = latent_BMd.detach().float(), []
        for book in self._stages(bits):
            found.append(book.nearest(rest_BMd))
            rest_BMd = rest_BMd - book.codes_Kd.detach()[found[-1]]
        return torch.stack(found, -1).flatten(1)

    def values(self, symbols_BN: Tensor, bits: int, latents: int) -> Tensor:
        """The sums of the codes' vectors `[B, M, d]`."""
        books = self._stages(bits)
        symbols_BMS = symbols_BN.reshape(len(symbols_BN), latents, len(books))
        latent_BMd = torch.zeros(len(symbols_BN), latents, self.d_z, device=symbols_BN.device)
        for stage, book in enumerate(books):
            codes_Kd = book.codes_Kd.detach().to(symbols_BN.device)
            latent_BMd = latent_BMd + codes_Kd[symbols_BMS[..., stage]]
        return latent_BMd

    def format_tensors(self) -> dict[str, Tensor]:
        """The frequencies and the codes of all stages."""
        books = self._stages(self.config.rates[0])
        codes = {f"codes_Kd.{i}": book.codes_Kd.detach() for i, book in enumerate(books)}
        return super().format_tensors() | codes
