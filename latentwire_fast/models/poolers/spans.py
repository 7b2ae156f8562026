"""Means over contiguous spans of a text's hidden states."""

from __future__ import annotations

import torch
from torch import Tensor


def pool_spans(hidden_BTD: Tensor, lengths_B: Tensor, spans: int) -> Tensor:
    """Means `[B, spans, D]` over contiguous spans of near equal length of each row's first
    positions.

    A row shorter than `spans` repeats positions rather than averaging nothing.
    """
    edges = torch.arange(spans + 1, device=hidden_BTD.device) * lengths_B[:, None]
    start = edges[:, :-1] // spans
    stop = torch.maximum(edges[:, 1:] // spans, start + 1)
    position = torch.arange(hidden_BTD.shape[1], device=hidden_BTD.device)
    inside = (position >= start[..., None]) & (position < stop[..., None])
    weights = inside.to(hidden_BTD) / inside.sum(-1, keepdim=True).clamp(min=1)
    return weights @ hidden_BTD
