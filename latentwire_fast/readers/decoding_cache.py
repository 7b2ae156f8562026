"""The cache that a reader decodes from: every position of every layer, padding out of the way.

Shapes: B rows, H key/value heads, N positions held, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache, cache_utils
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
)

from latentwire_fast.readers.arriving_layer import ArrivingLayer

# Layers from which decoding can go back to an earlier position. Since 5.23, transformers has one
# more class, for layers that keep nothing.
_CAN_GO_BACK = (
    *(DynamicLayer, ArrivingLayer, StaticLayer),
    *filter(None, [getattr(cache_utils, "DummyLayer", None)]),
)


def decoding_cache(model: PreTrainedModel) -> DynamicCache:
    """An empty cache to decode with, of layers that keep every position.

    transformers' own layers with a sliding window drop what has left it, and with it the prompt
    that a second decoding would start from. The model's masks hold the window either way. Layers
    that keep a state in the place of keys and values stay as they are (`keeps_states`).
    """
    cache = DynamicCache(config=model.config)
    for number, layer in enumerate(cache.layers):
        if type(layer) is DynamicSlidingWindowLayer:
            cache.layers[number] = DynamicLayer()
    return cache


def keeps_states(cache: Cache) -> bool:
    """Whether some layer keeps a state that takes in each token, and cannot go back to what it was
    before (linear attention, convolutions, state spaces)."""
    return any(type(layer) not in _CAN_GO_BACK for layer in cache.layers)


def tensors_of(cache: Cache) -> list[torch.Tensor]:
    """All that its layers hold, also where it is no keys and values; nothing is waited for."""
    values = (value for layer in cache.layers for value in vars(layer).values())
    return [value for value in values if isinstance(value, torch.Tensor)]


def has_window(model: PreTrainedModel) -> bool:
    """Whether some layer attends to its last positions only."""
    layers = DynamicCache(config=model.config).layers
    return any(type(layer) is DynamicSlidingWindowLayer for layer in layers)


def move_right(cache: DynamicCache, shifts_B: Sequence[int]) -> None:
    """Move row b of every layer by `shifts_B[b]` positions: what was the padding at its end is then
    at its start.

    Padding between a prompt and its answer does no harm where a model masks it out and takes its
    position ids for everything else. But a sliding window, or a distance between columns, counts
    the padding too. At the start of the row it is out of their way.
    """
    layers = _filled(cache)
    positions = torch.arange(layers[0].keys.shape[2])
    source_BN = (positions - torch.tensor([*shifts_B])[:, None]) % len(positions)
    devices = {layer.keys.device for layer in layers}
    source_of = {device: source_BN.to(device)[:, None, :, None] for device in devices}
    for layer in layers:
        index = source_of[layer.keys.device]
        layer.keys, layer.values = (
            part_BHND.gather(2, index.expand(-1, part_BHND.shape[1], -1, part_BHND.shape[3]))
            for part_BHND in (layer.keys, layer.values)
        )


def without_first(cache: DynamicCache, columns: int) -> DynamicCache:
    """A cache without its first columns; the one given stays as it is, and nothing is copied."""
    shorter = DynamicCache()
    for whole in _filled(cache):
        layer = DynamicLayer()
        layer.lazy_initialization(whole.keys, whole.values)
        layer.keys, layer.values = whole.keys[:, :, columns:], whole.values[:, :, columns:]
        shorter.layers.append(layer)
    return shorter


def without_limit(cache: StaticCache, positions: int) -> DynamicCache:
    """A cache that grows, with the first positions of a static one; nothing is copied yet."""
    grown = DynamicCache()
    for static in _filled(cache):
        layer = DynamicLayer()
        layer.lazy_initialization(static.keys, static.values)
        layer.keys, layer.values = static.keys[:, :, :positions], static.values[:, :, :positions]
        grown.layers.append(layer)
    return grown


def _filled(cache: DynamicCache | StaticCache) -> list[Any]:
    """The layers that hold keys and values."""
    return [x for x in cache.layers if isinstance(x, CacheLayerMixin) and x.is_initialized]
