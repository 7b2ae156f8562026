"""Codebooks and finite scalars: the nearest code of a row, and the levels of a channel.

Shapes: `N` rows, `K` codes, `d` width, `L` levels.
"""

from __future__ import annotations

import torch
from torch import Tensor

_DISTANCES = 1 << 24  # so many of them are in memory at once


def nearest_codes(rows_Nd: Tensor, codes_Kd: Tensor) -> Tensor:
    """`[N]` int64: the code with the smallest distance of each row, the first of those that tie.

    `argmin_k |c_k|^2 - 2 z . c_k`, in fp32 (fp64 for fp64 rows), also under autocast.
    """
    dtype = torch.float64 if rows_Nd.dtype == torch.float64 else torch.float32
    with torch.autocast(rows_Nd.device.type, enabled=False):
        codes_Kd = codes_Kd.to(dtype)
        squares_K = codes_Kd.square().sum(-1)
        chunk = max(1, _DISTANCES // len(codes_Kd))
        found = [
            torch.addmm(squares_K, piece_nd.to(dtype), codes_Kd.T, alpha=-2).argmin(-1)
            for piece_nd in rows_Nd.split(chunk)
        ]
    return torch.cat(found) if found else rows_Nd.new_zeros(0, dtype=torch.long)


def bounded(z: Tensor, levels_d: Tensor) -> Tensor:
    """z `[..., d]` drawn smoothly into the range of each channel's levels (FSQ, arXiv:2309.15505).

    `tanh(z + shift) * half - offset` with `half = (L - 1) (1 + 1e-3) / 2`, an offset of 1/2 where L
    is even, and the shift that keeps 0 at 0. Rounding gives `-(L // 2)` to `(L - 1) // 2`.
    """
    levels = levels_d.to(z.dtype)
    half = (levels - 1) * (1 + 1e-3) / 2
    offset = torch.where(levels_d % 2 == 0, 0.5, 0.0).to(z.dtype)
    return torch.tanh(z + torch.atanh(offset / half)) * half - offset


def level_values(levels_Nd: Tensor, counts_d: Tensor) -> Tensor:
    """What levels from 0 to L - 1 stand for: `(level - L // 2) / (L // 2)` in fp32, from -1 on."""
    middle_d = counts_d // 2
    return (levels_Nd - middle_d).float() / middle_d.float()
