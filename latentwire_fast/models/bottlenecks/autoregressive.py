"""The autoregressive prior of a bottleneck: frequencies that go by the symbols sent before.

Shapes: R messages, N symbols.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from latentwire_fast.models.bottlenecks.prior_network import learned_prior
from latentwire_fast.wire.native_prior import NativePrior, prior_of
from latentwire_fast.wire.range_coder import Rows
from latentwire_fast.wire.recurrent_prior import Layout, RecurrentPrior


class AutoregressivePrior(nn.Module):
    """The network's integers, part of the model's state; all 0, and so flat, before `fit`."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        for name, shape in layout.shapes.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.int16))

    @cached_property
    def network(self) -> RecurrentPrior | NativePrior:
        """What codes with these integers."""
        arrays = {name: tensor.cpu().numpy() for name, tensor in self.named_buffers()}
        return prior_of(self.layout, arrays)

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        super()._load_from_state_dict(*args, **options)
        self.__dict__.pop("network", None)  # of other integers

    def encode(self, symbols_RN: Tensor, rest: Rows) -> list[bytes]:
        """Messages of the rows' symbols and the others behind them, whose rows are given."""
        return self.network.encode(symbols_RN.cpu().numpy().astype(np.int64), rest)

    def decode(self, messages: Sequence[bytes], symbols: int, rest: Rows) -> np.ndarray:
        """The symbols `[R, N]` int64: so many of the rows, and the others.

        Raises:
            PayloadError: bytes that `encode` never writes.
        """
        return self.network.decode(messages, symbols, rest)

    def fit(self, symbols_RN: Tensor, frequencies_S: np.ndarray, *, steps: int) -> None:
        """Learn from the rows' symbols of messages.

        Args:
            frequencies_S: of each value of these symbols by itself, of 65536.
            steps: of the training.
        """
        sizes_N = np.tile(self.layout.sizes_C, self.layout.rows)
        frequencies_NK = np.ones((len(sizes_N), max(self.layout.sizes_C)), np.float32)
        is_value_NK = np.arange(frequencies_NK.shape[1]) < sizes_N[:, None]
        frequencies_NK[is_value_NK] = frequencies_S
        found = learned_prior(self.layout, symbols_RN.long(), frequencies_NK, steps=steps)
        for name, buffer in self.named_buffers():
            buffer.copy_(found[name])
        self.__dict__.pop("network", None)
