"""What dtype the formulas compute in."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that arithmetic on `x` is done in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
