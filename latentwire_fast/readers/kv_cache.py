"""Putting a K/V prefix into the cache of a transformers reader, before its first token.

    filler = CacheFiller.for_model(reader_model)
    cache = DynamicCache(config=reader_model.config)
    filler.fill(cache, prefix_L2BHPD=prefix, batch_size=8)
    reader_model(inputs_embeds=embeddings, past_key_values=cache)

The layers of a `DynamicCache` become views of what `kv_placement.py` moved: nothing is copied for
them. A `StaticCache` that was never used gets one block of memory per device, and takes any number
of prefixes in one copy per device.

Shapes: see `kv_placement.py`.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from latentwire_fast.errors import ConfigError
from latentwire_fast.readers.arriving_layer import ArrivingLayer, ReadOnlyLayer
from latentwire_fast.readers.checks import backbone_of
from latentwire_fast.readers.kv_geometry import KVGeometry, measured_geometry
from latentwire_fast.readers.kv_placement import Copies, Placement, Placer, plan


def layer_devices(model: PreTrainedModel) -> list[str]:
    """The device on which each decoder layer of a model computes.

    Where accelerate offloads a layer's weights, that is the device it brings them to, not the one
    where it keeps them.
    """
    return [_execution_device(layer) for layer in decoder_layers(model)]


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers of a causal LM, or of its backbone.

    Raises:
        ConfigError: it has none.
    """
    for decoder in (model.get_decoder(), backbone_of(model)):
        for name in ("layers", "h", "blocks"):  # `h`: GPT-2 and its kin; `blocks`: MPT
            layers = getattr(decoder, name, None)
            if isinstance(layers, nn.ModuleList):
                return layers
    raise ConfigError(f"a {type(model).__name__} has no decoder layers to place a prefix in")


def _execution_device(layer: nn.Module) -> str:
    # accelerate hooks a whole layer or, where it offloads weights one by one, the modules in it.
    for module in layer.modules():
        hook = getattr(module, "_hf_hook", None)
        for part in getattr(hook, "hooks", [hook]):
            device = getattr(part, "execution_device", None)
            if device is not None:
                return str(torch.device(device))
    return str(next(layer.parameters()).device)


def key_value_heads(config: Any) -> int:
    """The number of key/value heads of a decoder's configuration: all heads, if it names none."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


class CacheFiller:
    """Fills the caches of one reader with prefixes.

    Args:
        layer_devices: the device name of each layer.
        dtype: the dtype of the reader's keys and values.
        heads: the reader's key/value heads.
        head_width: the width of each.

    Raises:
        ConfigError: see `Placer`.
    """

    def __init__(
        self, layer_devices: Sequence[str], *, dtype: torch.dtype, heads: int, head_width: int
    ) -> None:
        self._placer = Placer(layer_devices, dtype=dtype)
        self._shape = (len(layer_devices), heads, head_width)
        # Blocks of static caches that this object initialised, by device.
        self._blocks: WeakKeyDictionary[Cache, list[torch.Tensor]] = WeakKeyDictionary()
        self._lock = threading.Lock()

    @classmethod
    def for_model(
        cls, model: PreTrainedModel, *, geometry: KVGeometry | None = None
    ) -> CacheFiller:
        """A filler for `model`.

        Args:
            geometry: of its keys and values; measured on one token unless given.

        Raises:
            ConfigError: a model that no deep prefix fits, or layers where nothing can be placed.
        """
        devices, layers = layer_devices(model), decoder_layers(model)
        plan(devices)  # raises before anything runs
        geometry = geometry or measured_geometry(model, DynamicCache(), layers=len(layers))
        heads, width = geometry.heads, geometry.head_width
        return cls(devices, dtype=model.dtype, heads=heads, head_width=width)

    def fill(
        self, cache: Cache, *, prefix_L2BHPD: torch.Tensor, batch_size: int, stable: bool = False
    ) -> Copies:
        """Put a prefix at positions 0..P-1 of a cache. Any thread may, in a cache of its own.

        Layers of a `DynamicCache` whose part is still on its way become `ArrivingLayer`s: what
        reads them waits, on its own stream. A `StaticCache` is there for what the streams that are
        current now do next.

        Args:
            cache: an empty `DynamicCache`; or a `StaticCache`, whose sequence is then the prefix
                alone, whatever it held. One that transformers initialised keeps its own tensors and
                takes 2 copies per layer.
            prefix_L2BHPD: floating-point, on any device; see `Placer.place`. Gradients flow back to
                it from a `DynamicCache`.
            batch_size: the reader's batch; B is that, or 1 and then broadcast.
            stable: see `Placer.place`.

        Returns:
            How often K/V data was copied.

        Raises:
            ConfigError: a prefix or a cache that does not fit the reader, or one another.
        """
        self._check(cache, prefix_L2BHPD)
        placement = self._placer.place(prefix_L2BHPD, batch_size=batch_size, stable=stable)
        if not cache.is_compileable:
            _fill_dynamic(cache, placement)
            return placement.copies
        with self._lock:
            own_copies = self._fill_static(cache, placement)
        for number in range(len(self._placer.plan)):
            placement.wait(number)
        copies = placement.copies
        return copies._replace(scatter=copies.scatter + own_copies)

    def _check(self, cache: Cache, prefix_L2BHPD: torch.Tensor) -> None:
        layers, heads, width = self._shape
        shape = list(prefix_L2BHPD.shape)
        if len(shape) == 6 and (shape[3], shape[5]) != (heads, width):
            raise ConfigError(
                f"the prefix has {shape[3]} key/value heads of width {shape[5]} and the reader "
                f"{heads} of width {width}; it was made for another reader"
            )
        if cache.layers and len(cache.layers) != layers:
            raise ConfigError(f"the cache has {len(cache.layers)} layers and the reader {layers}")
        if cache.offloading:
            raise ConfigError("an offloaded cache moves its layers itself; use one that does not")
        for layer in cache.layers:
            if type(layer) not in (DynamicLayer, ArrivingLayer, ReadOnlyLayer, StaticLayer):
                raise ConfigError(
                    f"a cache layer is a {type(layer).__name__}; a prefix goes into a DynamicCache "
                    "or a StaticCache with full attention in every layer"
                )
            if isinstance(layer, DynamicLayer) and layer.get_seq_length():
                raise ConfigError("the cache already holds positions; fill a new one")
            if isinstance(layer, StaticLayer):
                if prefix_L2BHPD.requires_grad and torch.is_grad_enabled():
                    raise ConfigError("a StaticCache passes no gradient; train with a DynamicCache")
                if len(shape) == 6 and shape[4] > layer.max_cache_len:
                    raise ConfigError(
                        f"the prefix has {shape[4]} positions and the cache holds "
                        f"{layer.max_cache_len}"
                    )

    def _fill_static(self, cache: Cache, placement: Placement) -> int:
        """Returns the copies that the placement does not count."""
        if not any(layer.is_initialized for layer in _layers(cache)):
            self._blocks[cache] = self._initialise(cache, placement)
        blocks = self._blocks.get(cache)
        positions = placement.keys[0].shape[2]
        own_copies = 0
        for number, group in enumerate(self._placer.plan):
            layers = [_layers(cache)[i] for i in group.layers]
            if blocks is not None and _is_block_of(blocks[number], layers):
                placement.scatter(number, target=blocks[number])
            else:
                placement.wait(number)
                own_copies += _copy_each(layers, group.layers, placement)
            counters = [layer.cumulative_length for layer in layers]
            torch._foreach_zero_(counters)
            torch._foreach_add_(counters, positions)
        return own_copies

    def _initialise(self, cache: Cache, placement: Placement) -> list[torch.Tensor]:
        """Give each device one block `[l, 2, B, H, N, D]`, of which the layers are views."""
        blocks = []
        for group in self._placer.plan:
            length = _layers(cache)[0].max_cache_len
            first = placement.keys[group.layers[0]]
            batch, heads, _, width = first.shape
            block = first.new_zeros(len(group.layers), 2, batch, heads, length, width)
            for number, (keys, values) in zip(group.layers, block, strict=True):
                layer = _layers(cache)[number]
                # The layer sets its fields by its own rules, with tensors of length 0 that the
                # block's views then replace.
                layer.max_cache_len = 0
                layer.lazy_initialization(first, first)
                layer.max_cache_len = length
                layer.keys, layer.values = keys, values
                torch._dynamo.mark_static_address(keys)
                torch._dynamo.mark_static_address(values)
            blocks.append(block)
        return blocks


def _layers(cache: Cache) -> list[Any]:
    """The layers, which `_check` has found to be of one of the two known kinds."""
    return cache.layers


def _fill_dynamic(cache: Cache, placement: Placement) -> None:
    # A model with more layers than the prefix must not find empty ones made for the rest.
    cache.layer_class_to_replicate = None
    while len(cache.layers) < len(placement.keys):
        cache.layers.append(DynamicLayer())
    for number, (keys, values) in enumerate(zip(placement.keys, placement.values, strict=True)):
        layer, under_way = _layers(cache)[number], placement.is_under_way(number)
        if under_way and not isinstance(layer, ArrivingLayer):
            layer = cache.layers[number] = ArrivingLayer()
        if isinstance(layer, ArrivingLayer):
            wait = partial(placement.wait_for_layer, number) if under_way else None
            layer.expect(keys, values, wait=wait)
            continue
        layer.dtype, layer.device = keys.dtype, keys.device
        layer.keys, layer.values = keys, values
        layer.is_initialized = True


def _is_block_of(block: torch.Tensor, layers: list[Any]) -> bool:
    """Whether the layers still are the views of the block (a beam search replaces them)."""
    views = [part.data_ptr() for layer in layers for part in (layer.keys, layer.values)]
    return views == [part.data_ptr() for part in block.flatten(0, 1)]


def _copy_each(layers: list[Any], numbers: list[int], placement: Placement) -> int:
    """Copy into layers that own their tensors; returns the number of copies."""
    targets = [part for layer in layers for part in (layer.keys, layer.values)]
    sources = [part for i in numbers for part in (placement.keys[i], placement.values[i])]
    positions = sources[0].shape[2]
    parts = [target[:, :, :positions] for target in targets]
    for part, source in zip(parts, sources, strict=True):
        if (part.shape, part.dtype, part.device) != (source.shape, source.dtype, source.device):
            raise ConfigError(
                f"the cache is {list(part.shape)} of {part.dtype} on {part.device} and the prefix "
                f"{list(source.shape)} of {source.dtype} on {source.device}"
            )
    torch._foreach_copy_(parts, sources)
    return len(parts)
