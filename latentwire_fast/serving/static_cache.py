"""A `StaticCache` as graphs use it: written by one pass, cut to some rows or to some length.

Shapes: L layers, B rows, H key/value heads, T new positions, N cache length.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache
from transformers.cache_utils import Cache, CacheLayerMixin, StaticLayer


class WriteThroughLayer(CacheLayerMixin):
    """Writes new keys and values into a static layer and hands back the part that is filled.

    The static layer's own `update` hands back all N positions, most of them empty, which needs a
    mask; a `DynamicCache` would have to be copied once more.

    Args:
        target: an initialised layer that holds `length` positions already.
    """

    def __init__(self, target: StaticLayer, *, length: int) -> None:
        super().__init__()
        self._target: Any = target
        self._length = length
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The target has its memory."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, H, length, d_head]` with these T positions at their end."""
        start, self._length = self._length, self._length + key_states.shape[2]
        keys, values = (
            whole[:, :, : self._length] for whole in (self._target.keys, self._target.values)
        )
        keys[:, :, start:].copy_(key_states)
        values[:, :, start:].copy_(value_states)
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that `query_length` new positions see."""
        return self._length + query_length, 0

    def get_seq_length(self) -> int:
        """Positions held."""
        return self._length

    def get_max_length(self) -> int:
        """Positions that fit."""
        return self._target.max_cache_len


def write_through(cache: StaticCache, *, length: int) -> Cache:
    """A cache for one forward pass that writes into `cache` behind its first `length` positions."""
    return Cache(layers=[WriteThroughLayer(layer, length=length) for layer in _layers(cache)])


def set_length(cache: StaticCache, length: int) -> None:
    """Make a static cache hold its first `length` positions, whatever it held."""
    counters = [layer.cumulative_length for layer in _layers(cache)]
    torch._foreach_zero_(counters)
    torch._foreach_add_(counters, length)


def first_rows(cache: StaticCache, rows: int) -> StaticCache:
    """A cache of the first rows of another one, whose memory it shares."""
    shorter = copy(cache)
    shorter.layers = []
    for whole in _layers(cache):
        layer = copy(whole)
        layer.keys, layer.values = whole.keys[:rows], whole.values[:rows]
        layer.batch_size = rows
        shorter.layers.append(layer)
    return shorter


def _layers(cache: StaticCache) -> list[Any]:
    """Its layers, which are all static ones."""
    return cache.layers
