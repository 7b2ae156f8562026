"""Prefills and decoding steps as CUDA graphs.

A captured pass reads its inputs from one fixed block, writes keys and values straight into a
`StaticCache` of its own, and leaves its logits in one place; replaying it is one launch. A captured
step reads one token more of each row of that cache.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

import numpy as np
import torch
from torch import Tensor
from transformers import StaticCache

from latentwire_fast.readers.decoding_cache import tensors_of
from latentwire_fast.serving.batch import Batch
from latentwire_fast.serving.decode_step import DecodeStep
from latentwire_fast.serving.input_buffer import InputBuffer

# Passes before the capture: kernels are compiled and libraries set up, which a capture forbids.
WARM_UPS = 2
# What the driver keeps of one graph of a thousand kernels. An assumption: not yet measured.
GRAPH_BYTES = 16 << 20


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

    A capture that cannot be ended leaves the capture's stream current, the allocators serving it
    from the pool, and the generator counting on a graph: every later draw of random numbers on the
    device would fail. The allocator of pinned memory cannot be told (torch 2.11), and would refuse
    the next capture into that pool: there is a new one.
    """
    before = torch.cuda.current_stream()
    try:
        yield
    except BaseException:
        torch.cuda.set_stream(before)
        device = before.device_index
        with suppress(RuntimeError):  # it has ended, as it should
            torch._C._cuda_endAllocateToPool(device, memory.pool)
        memory.pool = torch.cuda.graph_pool_handle()
        generator = torch.cuda.default_generators[device]
        generator.graphsafe_set_state(generator.clone_state())
        raise


def record(
    run: Callable[[], Tensor],
    *,
    memory: GraphMemory,
    prepare: Callable[[], None] = lambda: None,
) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Some work as a graph; and its result, which each replay overwrites. The caller has acquired
    the memory.

    Args:
        prepare: done before each of the `WARM_UPS`.
    """
    memory.stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(memory.stream):
        for _ in range(WARM_UPS):
            prepare()
            run()
    torch.cuda.current_stream().wait_stream(memory.stream)
    graph = torch.cuda.CUDAGraph()
    with (
        recover_from_failed_capture(memory),
        torch.cuda.graph(graph, pool=memory.pool, stream=memory.stream),
    ):
        result = run()
    return graph, result


class CapturedPass:
    """A prefill as a graph, with everything that it reads and writes.

    Args:
        forward: the pass; given input tensors, it writes into `cache` and returns logits `[B, V]`.
        batch: one of those that it will serve, to warm up with.
        cache: not yet used.
        memory: see `GraphMemory`.

    Attributes:
        cache: behind the prompts of the last replay.
        serial: of the last replay.
        step: decodes from the cache; None until someone does.
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
        self.step: CapturedStep | None = None
        self._memory = memory
        self._readers: list[torch.cuda.Stream] = []
        self._inputs = InputBuffer(batch.fields, device=memory.stream.device)
        memory.acquire()
        self._inputs.fill(batch.values())
        self._forward = forward  # kept: a mask in it is read by each replay
        self._graph, self._logits_BV = record(lambda: forward(self._inputs.tensors), memory=memory)
        memory.release()

    @property
    def bytes(self) -> int:
        """Of its own memory: cache, logits, and the graph itself."""
        own = [self._logits_BV, *tensors_of(self.cache), *self._inputs.tensors.values()]
        step = 0 if self.step is None else self.step.bytes
        return GRAPH_BYTES + step + sum(tensor.nbytes for tensor in own)

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


class CapturedStep:
    """One token of each row of a captured pass as a graph.

    Args:
        step: of the pass's cache, started.
        memory: see `GraphMemory`.
    """

    def __init__(self, step: DecodeStep, *, memory: GraphMemory) -> None:
        self._step, self._memory = step, memory
        memory.acquire()
        self._graph, self._logits_BV = record(step.logits, memory=memory, prepare=step.restart)
        memory.release()

    @property
    def bytes(self) -> int:
        """Of its own memory."""
        return GRAPH_BYTES + self._logits_BV.nbytes + self._step.bytes

    def start(self, lengths_B: np.ndarray, *, columns: int) -> None:
        """See `DecodeStep.start`."""
        self._memory.acquire()
        self._step.start(lengths_B, columns=columns)
        self._memory.release()

    def run(self, token_B: Tensor) -> Tensor:
        """Logits `[B, V]` of the tokens after these, a copy."""
        self._memory.acquire()
        self._step.token_B[: len(token_B)].copy_(token_B)
        self._graph.replay()
        logits_BV = self._logits_BV[: len(token_B)].clone()
        self._memory.release()
        return logits_BV
