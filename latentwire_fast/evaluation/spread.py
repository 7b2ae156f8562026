"""How far vectors of different examples lie apart: the measures of a collapse.

Shapes: B examples, M vectors each, D their width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def latent_statistics(latent_BMD: Tensor) -> dict[str, float]:
    """Whether latents of different examples differ.

    Returns:
        `pairwise_cosine`: mean cosine of the flattened latents of two examples; 1 means collapse.
        `effective_rank`: exp of the entropy of the normalised singular values (Roy and Vetterli,
        2007) of the flattened latents minus their mean: at most B - 1, and 0 when all are equal.
        Both are NaN for fewer than two examples.
    """
    rows = latent_BMD.detach().flatten(1).double()
    count = len(rows)
    if count < 2:
        return {"pairwise_cosine": math.nan, "effective_rank": math.nan}
    unit = nn.functional.normalize(rows, dim=1)
    cosines = unit @ unit.T
    pairwise = (cosines.sum() - cosines.trace()) / (count * (count - 1))
    singular = torch.linalg.svdvals(rows - rows.mean(0))
    # What is left of equal rows after centring is rounding, and has a rank that means nothing.
    noise = rows.norm() * torch.finfo(rows.dtype).eps * count
    if bool(singular.sum() <= noise):
        return {"pairwise_cosine": pairwise.item(), "effective_rank": 0.0}
    entropy = torch.special.entr(singular / singular.sum()).sum()
    return {"pairwise_cosine": pairwise.item(), "effective_rank": entropy.exp().item()}


def variance_shares(latent_BMD: Tensor, *, count: int = 16) -> list[float]:
    """The spectrum of the covariance of flattened latents: the shares of all variance that lie in
    the first `count` directions, the largest first; none for fewer than two examples or equal
    ones."""
    rows = latent_BMD.detach().flatten(1).double()
    if len(rows) < 2:
        return []
    variances = torch.linalg.svdvals(rows - rows.mean(0)).square()
    total = variances.sum().item()
    if not total > 0:
        return []
    shares: list[float] = (variances[:count] / total).tolist()
    return shares
