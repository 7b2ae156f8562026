"""Prefills as CUDA graphs: one for each shape of batch, in a bounded amount of memory.

A captured pass reads its inputs from one fixed block, writes keys and values straight into a
`StaticCache` of its own, and leaves its logits in one place; replaying it is one launch.

Shapes: L layers, B rows, H key/value heads, T new positions, N cache length, V vocabulary.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import StaticCache
from transformers.cache_utils import Cache, CacheLayerMixin, StaticLayer

from latentwire_fast.readers.decoding_cache import tensors_of
from latentwire_fast.serving.batch import Batch, Shape
from latentwire_fast.serving.input_buffer import InputBuffer

logger = logging.getLogger(__name__)

# Passes before the capture: kernels are compiled and libraries set up, which a capture forbids.
WARM_UPS = 2
# What the driver keeps of one graph of a thousand kernels. An assumption: not yet measured.
GRAPH_BYTES = 16 << 20


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


class GraphMemory:
    """What a receiver's graphs share, since no two of them run at the same time: the pool, the
    stream that memory in it belongs to, and the order in which they run.

    Replays are ordered among all of them, on whichever streams they are asked for: what one graph
    leaves in the pool, another overwrites.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self._used = torch.cuda.Event()

    def acquire(self) -> None:
        """The current stream waits for whatever another one still does with the memory."""
        torch.cuda.current_stream().wait_event(self._used)

    def release(self) -> None:
        """The current stream has queued its last use."""
        self._used.record()


@contextmanager
def recover_from_failed_capture(memory: GraphMemory) -> Iterator[None]:
    """After a capture that failed in the block, the process can go on.

    A capture that cannot be ended leaves the capture's stream current, the allocator serving it
    from the pool, and the generator counting on a graph: every later draw of random numbers on the
    device would fail.
    """
    before = torch.cuda.current_stream()
    try:
        yield
    except BaseException:
        torch.cuda.set_stream(before)
        device = before.device_index
        with suppress(RuntimeError):  # it has ended, as it should
            torch._C._cuda_endAllocateToPool(device, memory.pool)
        generator = torch.cuda.default_generators[device]
        generator.graphsafe_set_state(generator.clone_state())
        raise


class CapturedPass:
    """One forward pass as a graph, with everything that it reads and writes.

    Args:
        forward: the pass; given input tensors, it writes into `cache` and returns logits `[B, V]`.
        batch: one of those that it will serve, to warm up with.
        cache: not yet used.
        memory: see `GraphMemory`.
    """

    def __init__(
        self,
        forward: Callable[[Mapping[str, Tensor]], Tensor],
        batch: Batch,
        *,
        cache: StaticCache,
        memory: GraphMemory,
    ) -> None:
        self.cache = cache
        self.serial = 0
        self._memory = memory
        self._readers: list[torch.cuda.Stream] = []
        self._inputs = InputBuffer(batch.fields, device=memory.stream.device)
        memory.acquire()
        self._inputs.fill(batch.values())
        memory.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(memory.stream):
            for _ in range(WARM_UPS):
                forward(self._inputs.tensors)
        torch.cuda.current_stream().wait_stream(memory.stream)
        self._graph = torch.cuda.CUDAGraph()
        with (
            recover_from_failed_capture(memory),
            torch.cuda.graph(self._graph, pool=memory.pool, stream=memory.stream),
        ):
            self._logits_BV = forward(self._inputs.tensors)
        memory.release()

    @property
    def bytes(self) -> int:
        """Of its own memory: cache, logits, and the graph itself."""
        own = [self._logits_BV, *tensors_of(self.cache), *self._inputs.tensors.values()]
        return GRAPH_BYTES + sum(tensor.nbytes for tensor in own)

    def lend(self) -> None:
        """The current stream is going to read the cache: the next `fill` waits for what it has
        queued by then."""
        stream = torch.cuda.current_stream(self._memory.stream.device)
        if stream not in self._readers:
            self._readers.append(stream)

    def fill(self, values: Mapping[str, np.ndarray]) -> None:
        """Send new inputs off, behind whatever another stream still does with the memory."""
        self._memory.acquire()
        current = torch.cuda.current_stream()
        for stream in self._readers:
            if stream != current:
                current.wait_stream(stream)
        self._readers.clear()
        self._inputs.fill(values)

    def replay(self) -> Tensor:
        """Run the pass on what was filled in. Returns a copy of its logits `[B, V]`."""
        self.serial += 1
        self._graph.replay()
        logits_BV = self._logits_BV.clone()
        self._memory.release()
        return logits_BV


class Kept(Protocol):
    """A captured pass, as far as it is kept."""

    @property
    def bytes(self) -> int:
        """Device memory that is freed with it."""
        ...


P = TypeVar("P", bound=Kept)


class PassCache(Generic[P]):
    """The captured passes of one receiver: the last used ones that fit into so many bytes, and
    always the newest.

    A pass that is dropped stays in memory for as long as a result of it is in use.
    """

    def __init__(self, limit: float) -> None:
        self.captures = 0
        self._limit = limit
        self._passes: OrderedDict[Shape, P] = OrderedDict()

    def get(self, shape: Shape, capture: Callable[[], P]) -> P:
        """The pass for a shape, captured now if it is not there."""
        found = self._passes.pop(shape, None)
        if found is None:
            found = self._captured(capture)
        self._passes[shape] = found
        while len(self._passes) > 1 and self.bytes > self._limit:
            dropped, _ = self._passes.popitem(last=False)
            logger.info("dropped the graph for %s to make room for %s", dropped, shape)
        return found

    def _captured(self, capture: Callable[[], P]) -> P:
        try:
            found = capture()
        except torch.OutOfMemoryError:
            if not self._passes:
                raise
            logger.info("no memory for one more graph: dropped all %d", len(self._passes))
            self._passes.clear()
            found = capture()
        self.captures += 1
        return found

    @property
    def bytes(self) -> int:
        """Of all of them."""
        return sum(kept.bytes for kept in self._passes.values())

    @property
    def shapes(self) -> Sequence[Shape]:
        """The captured shapes, least recently used first."""
        return list(self._passes)


def memory_for_graphs(device: torch.device) -> float:
    """A quarter of what is free now, in bytes; on a CPU, which has no graphs, no limit."""
    return torch.cuda.mem_get_info(device)[0] / 4 if device.type == "cuda" else math.inf
