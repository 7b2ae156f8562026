"""A codebook: vectors that are learned, by the gradient or as running means, and kept in use.

Shapes: N rows, K codes, d width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from latentwire_fast import ops
from latentwire_fast.config.base import require
from latentwire_fast.models.bottlenecks.gradients import Passing
from latentwire_fast.models.bottlenecks.symbol_config import SymbolConfig


@dataclass(frozen=True)
class CodebookConfig(SymbolConfig):
    """How a codebook is learned.

    Attributes:
        update: `gradient`: by the codes' distance to the latents, a part of the loss; `ema`: codes
            are running means of the latents that chose them.
        passing: how gradients pass the choice of a code (`gradients.py`).
        commitment: weight of the latents' distance to their codes in the bottleneck's loss.
        decay: of the running means, per step.
        dead_below: a code that is chosen less often than this share of the mean begins anew at a
            latent far from all codes; 0: never.
    """

    update: Literal["gradient", "ema"] = "gradient"
    passing: Passing = "straight"
    commitment: float = 0.25
    decay: float = 0.99
    dead_below: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.commitment >= 0, f"commitment={self.commitment}, expected at least 0")
        require(0 < self.decay < 1, f"decay={self.decay}, expected in (0, 1)")
        require(0 <= self.dead_below < 1, f"dead_below={self.dead_below}, expected in [0, 1)")


class Codebook(nn.Module):
    """K vectors. What they have learned outside of gradients is part of the saved state."""

    table_parameters: ClassVar[tuple[str, ...]] = ("codes_Kd",)

    def __init__(self, config: CodebookConfig, codes: int, d_z: int) -> None:
        super().__init__()
        self.config = config
        by_gradient = config.update == "gradient"
        self.codes_Kd = nn.Parameter(torch.randn(codes, d_z), requires_grad=by_gradient)
        self.register_buffer("share_K", torch.full((codes,), 1.0 / codes))
        self.register_buffer("sums_Kd", None if by_gradient else torch.zeros(codes, d_z))
        self.register_buffer("started", torch.zeros((), dtype=torch.int64))
        self.share_K: Tensor
        self.sums_Kd: Tensor | None
        self.started: Tensor

    def nearest(self, rows: Tensor) -> Tensor:
        """The nearest code of each row `[..., d]`: `[...]` int64."""
        flat_Nd = rows.detach().reshape(-1, rows.shape[-1])
        return ops.nearest_codes(flat_Nd, self.codes_Kd.detach()).reshape(rows.shape[:-1])

    def loss_B(self, rows_BMd: Tensor, chosen_BMd: Tensor) -> Tensor:
        """By text, the mean squared distance of its rows to their codes: the rows' gradient weighs
        `commitment`, the codes' 1 (0 where they are running means)."""
        loss_B = self.config.commitment * _distance(rows_BMd, chosen_BMd.detach())
        if self.config.update == "gradient":
            loss_B = loss_B + _distance(rows_BMd.detach(), chosen_BMd)
        return loss_B

    @torch.no_grad()
    def learn(self, rows_Nd: Tensor) -> Tensor:
        """Take in the rows of a step; returns their codes `[N]`. Nothing here is random, so that
        every process that sees the same rows ends up with the same codes."""
        codes = len(self.codes_Kd)
        rows_Nd = rows_Nd.to(self.codes_Kd)
        if not self.started:
            self._begin_at(torch.arange(min(codes, len(rows_Nd)), device=rows_Nd.device), rows_Nd)
            self.started.fill_(1)
        chosen_N = self.nearest(rows_Nd)
        counts_K = torch.bincount(chosen_N, minlength=codes).to(self.share_K)
        self.share_K.lerp_(counts_K / len(rows_Nd), 1 - self.config.decay)
        if self.sums_Kd is not None:
            sums_Kd = torch.zeros_like(self.sums_Kd).index_add_(0, chosen_N, rows_Nd)
            self.sums_Kd.lerp_(sums_Kd / len(rows_Nd), 1 - self.config.decay)
            used_K1 = (self.share_K > 1e-8)[:, None]
            mean_Kd = self.sums_Kd / self.share_K[:, None].clamp(min=1e-8)
            self.codes_Kd.copy_(torch.where(used_K1, mean_Kd, self.codes_Kd))
        self._revive(rows_Nd, chosen_N)
        return chosen_N

    def _revive(self, rows_Nd: Tensor, chosen_N: Tensor) -> None:
        dead = (self.share_K < self.config.dead_below / len(self.share_K)).nonzero().flatten()
        if len(dead):
            far_N = (rows_Nd - self.codes_Kd[chosen_N]).square().sum(-1)
            count = min(len(dead), len(rows_Nd))
            self._begin_at(dead[:count], rows_Nd[far_N.topk(count).indices])

    def _begin_at(self, places: Tensor, rows_Nd: Tensor) -> None:
        """Let the codes at these places begin anew at the first of these rows."""
        rows_Nd = rows_Nd[: len(places)]
        share = 1.0 / len(self.share_K)
        self.codes_Kd[places] = rows_Nd
        self.share_K[places] = share
        if self.sums_Kd is not None:
            self.sums_Kd[places] = rows_Nd * share


def _distance(left_BMd: Tensor, right_BMd: Tensor) -> Tensor:
    """By text, the mean squared difference."""
    return (left_BMd - right_BMd).square().flatten(1).mean(1)
