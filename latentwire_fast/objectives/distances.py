"""How far vectors are from those that they are to be.

Shapes: N vectors, D their width.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

Form = Literal["mse", "cosine"]


def distances(ours_ND: Tensor, theirs_ND: Tensor, *, form: Form) -> Tensor:
    """Distances `[N]`: the squared error relative to the mean square of the vector that ours is to
    be, or 1 minus the cosine."""
    if form == "cosine":
        return 1 - F.cosine_similarity(ours_ND, theirs_ND, dim=-1)
    size_N = theirs_ND.square().mean(-1).clamp(min=1e-8)
    return (ours_ND - theirs_ND).square().mean(-1) / size_N
