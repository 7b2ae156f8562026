"""How often each symbol has come lately, and what symbols cost under that: the rate of a training.

Shapes: B texts, N symbols of an alphabet, n of them that a latent decides, S values of all symbols.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

_DECAY = 0.99  # of the running shares, per step
_FLOOR = 0.01  # share of a flat row in every row: nothing costs more than some bits too much


class RunningPrior(nn.Module):
    """Running shares of every symbol's values: a prior that treats all symbols as independent."""

    def __init__(self, sizes_N: np.ndarray) -> None:
        super().__init__()
        flat = np.repeat(1.0 / sizes_N, sizes_N).astype(np.float32)
        self.register_buffer("share_S", torch.from_numpy(flat))
        sizes = torch.from_numpy(sizes_N.astype(np.int64))
        self.register_buffer("sizes_N", sizes, persistent=False)
        self.register_buffer("starts_N", sizes.cumsum(0) - sizes, persistent=False)
        self.share_S: Tensor
        self.sizes_N: Tensor
        self.starts_N: Tensor

    @torch.no_grad()
    def learn(self, symbols_BN: Tensor, places: np.ndarray) -> None:
        """Take in the symbols of a step, which stand at these places of the alphabet."""
        at_N = torch.from_numpy(places).to(self.share_S.device)
        index_BN = self.starts_N[at_N] + symbols_BN.to(self.share_S.device)
        counts_S = torch.bincount(index_BN.flatten(), minlength=len(self.share_S))
        fresh_S = counts_S.float() / len(symbols_BN)
        seen_N = torch.zeros_like(self.sizes_N, dtype=torch.bool)
        seen_N[at_N] = True
        seen_S = seen_N.repeat_interleave(self.sizes_N)
        mixed_S = torch.lerp(self.share_S, fresh_S, 1 - _DECAY)
        self.share_S.copy_(torch.where(seen_S, mixed_S, self.share_S))

    def bits(self, soft_Bn: Tensor, places: np.ndarray) -> Tensor:
        """By text, the bits of its symbols: between two neighbours, what lies between their costs.

        The gradient draws a symbol towards its cheaper neighbour; the shares count as constants.

        Args:
            soft_Bn: symbols before they are rounded.
            places: of the alphabet, whose first n are theirs.
        """
        count = soft_Bn.shape[1]
        at_n = torch.from_numpy(places[:count]).to(soft_Bn.device)
        largest_n = self.sizes_N[at_n] - 1
        low_Bn = torch.minimum(soft_Bn.detach().floor().long().clamp(min=0), largest_n - 1)
        part_Bn = (soft_Bn - low_Bn).clamp(0, 1)
        index_Bn = self.starts_N[at_n] + low_Bn
        cost_S = self._costs()
        return ((1 - part_Bn) * cost_S[index_Bn] + part_Bn * cost_S[index_Bn + 1]).sum(1)

    def _costs(self) -> Tensor:
        """The bits of every value, `[S]`."""
        flat_S = (1 / self.sizes_N).repeat_interleave(self.sizes_N)
        return -torch.lerp(self.share_S, flat_S, _FLOOR).log2()
