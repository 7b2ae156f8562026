"""The symbols of a latent: how many values each has, and which of them come.

Shapes: B texts, N symbols of a latent.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from latentwire_fast.config.base import require


@dataclass(frozen=True)
class Alphabet:
    """The symbols of a latent with all its M rows, in the order of the wire.

    Attributes:
        sizes_N: how many values each has.
        kinds_N: those of one kind mean the same in different places.
    """

    sizes_N: np.ndarray
    kinds_N: np.ndarray


def usage_of(symbols_BN: np.ndarray, alphabet: Alphabet) -> dict[str, dict[str, float]]:
    """By kind of symbol, the share of its values that come at all, and the perplexity: how many
    equally likely values would be as hard to guess."""
    found: dict[str, dict[str, float]] = {}
    for kind in np.unique(alphabet.kinds_N).tolist():
        members = np.flatnonzero(alphabet.kinds_N == kind)
        size = int(alphabet.sizes_N[members[0]])
        counts = np.bincount(symbols_BN[:, members].reshape(-1), minlength=size)
        share = counts[counts > 0] / counts.sum()
        found[str(kind)] = {
            "usage": len(share) / size,
            "perplexity": float(np.exp(-(share * np.log(share)).sum())),
        }
    return found


def require_codes(name: str, codes: int) -> None:
    """Raise unless a symbol can have so many values.

    Raises:
        ConfigError: fewer than 2, or more than the range coder's frequencies can tell apart.
    """
    require(2 <= codes <= 4096, f"{name}={codes}, expected 2 to 4096")
