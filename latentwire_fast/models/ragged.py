"""Payloads of latents that differ in their number of vectors: those of one number together.

Shapes: B latents, M vectors at most, d their width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def pack_ragged(
    pack: Callable[[Tensor], list[bytes]], latent_BMd: Tensor, counts: Sequence[int]
) -> list[bytes]:
    """One payload for the first `counts[b]` vectors of each latent.

    Args:
        pack: latents `[b, m, d]` to a payload each.
    """
    packed: dict[int, bytes] = {}
    for count, rows in _rows_by(counts).items():
        packed |= dict(zip(rows, pack(latent_BMd[rows, :count]), strict=True))
    return [packed[row] for row in range(len(counts))]


def unpack_ragged(
    unpack: Callable[[Sequence[bytes]], Tensor],
    payloads: Sequence[bytes],
    counts: Sequence[int],
    *,
    latents: int,
) -> Tensor:
    """Latents `[B, latents, d]` with zeros in the place of vectors that a payload has not.

    Args:
        unpack: payloads of one number of vectors to latents `[b, m, d]`.
        counts: vectors of each payload.
    """
    found: dict[int, Tensor] = {}
    for count, rows in _rows_by(counts).items():
        padded_bMd = F.pad(unpack([payloads[r] for r in rows]), (0, 0, 0, latents - count))
        found |= dict(zip(rows, padded_bMd, strict=True))
    return torch.stack([found[row] for row in range(len(counts))])


def _rows_by(counts: Sequence[int]) -> dict[int, list[int]]:
    """The rows of each count."""
    rows: dict[int, list[int]] = {}
    for row, count in enumerate(counts):
        rows.setdefault(count, []).append(row)
    return rows
