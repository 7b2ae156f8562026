"""Cache layers whose keys and values may still be on their way to the layer's device.

A prefix crosses to another device on a stream of its own (`kv_placement.py`). Whatever reads it
must make its own stream wait until it is there. The wait belongs to the layer: it happens when the
layer's keys or values are looked at, on the stream that looks at them, whichever cache another
stream reads meanwhile.

Shapes: B batch, H key/value heads, P positions of the prefix, T new positions, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer


class ArrivingLayer(DynamicLayer):
    """A layer that has its reader's stream wait for what is on its way.

    After the first update keys and values are tensors of the layer's own, on the stream that made
    them; from then on it is a `DynamicLayer` like any other.
    """

    def __init__(self) -> None:
        self._wait: Callable[[], None] | None = None
        super().__init__()

    def expect(
        self, keys: torch.Tensor, values: torch.Tensor, *, wait: Callable[[], None] | None
    ) -> None:
        """Take in a prefix `[B, H, P, D]`.

        Args:
            wait: makes the current stream wait until it is there; None where it is.
        """
        self.dtype, self.device = keys.dtype, keys.device
        self.keys, self.values = keys, values
        self.is_initialized = True
        self._wait = wait

    def settle(self) -> None:
        """Make the current stream wait, if there is anything to wait for."""
        if self._wait is not None:
            self._wait()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `[B, H, P + T, D]`, kept."""
        grown = super().update(key_states, value_states, *args, **kwargs)
        self._wait = None
        return grown

    # transformers reads and replaces these two as plain attributes.

    @property
    def keys(self) -> torch.Tensor | None:
        """`[B, H, P, D]`, once they are there for the current stream."""
        self.settle()
        return self._keys

    @keys.setter
    def keys(self, keys: torch.Tensor | None) -> None:
        self._keys = keys

    @property
    def values(self) -> torch.Tensor | None:
        """Likewise."""
        self.settle()
        return self._values

    @values.setter
    def values(self, values: torch.Tensor | None) -> None:
        self._values = values

    def __getstate__(self) -> dict[str, Any]:
        """For `copy.deepcopy`, which then reads the tensors: after the wait."""
        self.settle()
        return vars(self) | {"_wait": None}


class ReadOnlyLayer(ArrivingLayer):
    """A layer that puts its prefix before new keys and values and keeps none of them.

    What training needs: where activations are checkpointed, backward runs a layer a second time,
    which must not find what the first run left.
    """

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `[B, H, P + T, D]` for these T positions."""
        keys, values = self.keys, self.values
        assert keys is not None  # filled before any layer runs
        assert values is not None
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)


def training_cache(layers: int) -> Cache:
    """An empty cache of so many read-only layers, for `CacheFiller.fill`."""
    return Cache(layers=[ReadOnlyLayer() for _ in range(layers)])


def settle(cache: Cache) -> None:
    """Make the current streams wait for everything on its way, and the layers plain ones.

    For compiled code, which would trace the waits.
    """
    for number, layer in enumerate(cache.layers):
        if isinstance(layer, ArrivingLayer):
            plain = DynamicLayer()
            plain.dtype, plain.device = layer.dtype, layer.device
            plain.keys, plain.values = layer.keys, layer.values
            plain.is_initialized = layer.is_initialized
            cache.layers[number] = plain
