"""A graph's path without a GPU: receivers take it, with its buffers and its static cache."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from latentwire_fast.readers.decoding_cache import tensors_of
from latentwire_fast.serving import forward_pass, graph_engine, receiver
from latentwire_fast.serving.decode_step import DecodeStep
from latentwire_fast.serving.input_buffer import InputBuffer


class UncapturedPass:
    """A `CapturedPass` that runs its forward again instead of replaying it."""

    def __init__(self, forward: Callable[..., Tensor], batch: Any, *, cache: Any, memory: Any):
        self.cache, self.serial = cache, 0
        self.step: Any = None
        self._forward = forward
        self._inputs = InputBuffer(batch.fields, device=torch.device("cpu"))
        self._inputs.fill(batch.values())
        forward(self._inputs.tensors)

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in tensors_of(self.cache))

    def lend(self) -> None:
        """There is one stream."""

    def fill(self, values: dict[str, np.ndarray]) -> None:
        self._inputs.fill(values)

    def replay(self) -> Tensor:
        self.serial += 1
        return self._forward(self._inputs.tensors)


class UncapturedStep:
    """Likewise a `CapturedStep`."""

    def __init__(self, step: DecodeStep, *, memory: Any) -> None:
        self._step = step
        step.restart()
        step.logits()
        self.start = step.start

    def run(self, token_B: Tensor) -> Tensor:
        self._step.token_B[: len(token_B)] = token_B
        return self._step.logits()[: len(token_B)]


@pytest.fixture
def uncaptured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Receivers take the graph's path, with its buffers and its static cache, on the CPU."""
    monkeypatch.setattr(forward_pass, "CapturedPass", UncapturedPass)
    monkeypatch.setattr(graph_engine, "CapturedStep", UncapturedStep)
    monkeypatch.setattr(graph_engine, "GraphMemory", lambda device: None)
    monkeypatch.setattr(receiver, "choose_engine", lambda *_, **__: ("graph", "a test"))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())


@pytest.fixture(params=["eager", "graph"])
def engine(request: pytest.FixtureRequest) -> str:
    if request.param == "graph":
        request.getfixturevalue("uncaptured")
    return request.param
