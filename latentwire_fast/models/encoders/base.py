"""What encoders share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from latentwire_fast.errors import DataError

Texts = Sequence[str]


def rms_normalize(latent: Tensor) -> Tensor:
    """Each latent vector scaled to a root mean square of 1 (zero stays zero)."""
    return latent * torch.rsqrt(latent.pow(2).mean(-1, keepdim=True) + 1e-6)


def check_length(length: int, limit: int, unit: str) -> None:
    """Raise a DataError if a text is longer than an encoder reads."""
    if length > limit:
        raise DataError(
            f"the text has {length:,} {unit}, the encoder reads {limit:,}; cut it into several"
        )
