"""The autoregressive prior in C++ (csrc/recurrent_prior.h), where the extension is built.

It is many times as fast as `recurrent_prior.py`, and writes and reads the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch  # noqa: F401 - its libraries, which the extension needs

from latentwire_fast.wire.range_coder import Rows, unwritten
from latentwire_fast.wire.recurrent_prior import POWERS, Layout, RecurrentPrior

try:
    from latentwire_fast import _C
except ImportError:
    _C = None  # type: ignore[assignment]

_CODING = 1  # of the extension that this file calls


def has_native() -> bool:
    """Whether the extension is there, and knows this."""
    return getattr(_C, "CODING", 0) == _CODING


def prior_of(layout: Layout, arrays: Mapping[str, np.ndarray]) -> RecurrentPrior | NativePrior:
    """The fastest network with these numbers that there is."""
    return (NativePrior if has_native() else RecurrentPrior)(layout, arrays)


class NativePrior:
    """As `RecurrentPrior`. Only where `has_native()`."""

    def __init__(self, layout: Layout, arrays: Mapping[str, np.ndarray]) -> None:
        numbers = {name: arrays[name].reshape(-1).tolist() for name in layout.shapes}
        shape = layout.rows, list(layout.sizes_C), layout.features, layout.width
        self._native = _C.RecurrentPrior(*shape, numbers, POWERS.tolist())

    def encode(self, symbols_BN: np.ndarray, rest: Rows) -> list[bytes]:
        """The messages of symbols."""
        return self._native.encode(symbols_BN.tolist(), [list(row) for row in rest])

    def decode(self, messages: Sequence[bytes], symbols: int, rest: Rows) -> np.ndarray:
        """The symbols `[B, N]` int64 of messages.

        Raises:
            PayloadError: bytes that `encode` never writes.
        """
        found = self._native.decode(list(messages), symbols, [list(row) for row in rest])
        for i, of_message in enumerate(found):
            if not of_message:
                raise unwritten(i, len(found))
        return np.array(found, np.int64)
