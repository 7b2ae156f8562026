"""A stand-in for torch.cuda as far as graphs use it, on a machine without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
import torch

POOL = (0, 7)


class FakeStream:
    device = torch.device("cpu")
    device_index = 0

    def __init__(self, name: str, cuda: FakeCuda) -> None:
        self.name, self.cuda = name, cuda

    def wait_event(self, event: Any) -> None:
        self.cuda.log.append(("wait", self.name, event.last))

    def wait_stream(self, other: FakeStream) -> None:
        self.cuda.log.append(("wait", self.name, other.name))


class FakeGenerator:
    """Counts draws for a graph until it is given another state, as CUDA's does."""

    def __init__(self) -> None:
        self.state = "fresh"

    def clone_state(self) -> str:
        return "fresh"

    def graphsafe_set_state(self, state: str) -> None:
        self.state = state


class FakeCuda:
    """torch.cuda as far as graphs use it: a current stream, and a log of what it was told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[tuple[str, str, Any]] = []
        self.current = FakeStream("default", self)
        self.generator = FakeGenerator()
        self.ended: list[tuple[int, Any]] = []
        self.spoilt: set[Any] = set()
        cuda, pools = self, count()

        class Event:
            last: str | None = None

            def record(self) -> None:
                self.last = cuda.current.name
                cuda.log.append(("record", cuda.current.name, None))

        replay = lambda: cuda.log.append(("replay", cuda.current.name, None))  # noqa: E731
        for name, stand_in in {
            "Stream": lambda device: FakeStream("capture", cuda),
            "Event": Event,
            "graph_pool_handle": lambda: (*POOL, next(pools)),
            "current_stream": lambda device=None: cuda.current,
            "set_stream": lambda stream: setattr(cuda, "current", stream),
            "stream": self.on,
            "graph": self.graph,
            "CUDAGraph": lambda: SimpleNamespace(replay=replay),
            "default_generators": (self.generator,),
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end, raising=False)

    @contextmanager
    def on(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    @contextmanager
    def graph(self, graph: Any, *, pool: Any, stream: FakeStream) -> Iterator[None]:
        """As torch's: where the capture cannot be ended, nothing is put back, and until somebody
        does, no other capture succeeds."""
        if self.generator.state != "fresh" or self.current is stream or pool in self.spoilt:
            raise RuntimeError("what a failed capture left was not repaired")
        before, self.current = self.current, stream
        self.generator.state = "capturing"
        self.spoilt.add(pool)
        yield
        self.spoilt.remove(pool)
        self.generator.state, self.current = "fresh", before

    def end(self, device: int, pool: Any) -> None:
        self.ended.append((device, pool))
        raise RuntimeError("not recording to this pool")
