"""What is shared by captured passes: the order of their replays, and a process that survives one
that fails. CUDA is replaced here; `test_receiver.py` tests the graphs themselves on a GPU."""

from __future__ import annotations

import weakref
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fake_cuda import POOL, FakeCuda, FakeStream
from latentwire_fast.serving.graphs import CapturedPass, CapturedStep, GraphMemory


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


def make_pass(memory: GraphMemory, forward: Any = lambda inputs: inputs["ids"] * 2) -> CapturedPass:
    values = {"ids": np.arange(3)}
    batch: Any = SimpleNamespace(fields={"ids": (torch.int64, (3,))}, values=lambda: values)
    cache: Any = object()
    return CapturedPass(forward, batch, cache=cache, memory=memory)


def masked(mask: torch.Tensor, inputs: Any) -> torch.Tensor:
    return inputs["ids"] * mask


def test_replays_of_all_shapes_are_ordered_across_streams(cuda: FakeCuda) -> None:
    """They share a pool: what one leaves there, the next overwrites, on whichever stream."""
    memory = GraphMemory(torch.device("cpu"))
    passes = [make_pass(memory) for _ in range(2)]
    streams = [FakeStream(name, cuda) for name in ("one", "two")]
    cuda.log.clear()
    for number in range(4):
        cuda.current = streams[number % 2]
        passes[number % 2].fill({"ids": np.arange(3)})
        assert passes[number % 2].replay().tolist() == [0, 2, 4]
    used = "default"  # where the last capture ended
    for number in range(4):
        stream = streams[number % 2].name
        assert cuda.log[3 * number : 3 * number + 3] == [
            ("wait", stream, used), ("replay", stream, None), ("record", stream, None),
        ]  # fmt: skip
        used = stream


def test_decoding_steps_are_ordered_with_the_other_graphs(cuda: FakeCuda) -> None:
    """A step's warm-ups go back to where it started; a run reads its rows' tokens alone."""
    memory = GraphMemory(torch.device("cpu"))
    calls: list[str] = []

    def logits() -> torch.Tensor:
        calls.append("logits")
        return torch.arange(4)

    step: Any = SimpleNamespace(
        token_B=torch.zeros(4, dtype=torch.long), logits=logits, bytes=8,
        restart=lambda: calls.append("restart"),
        start=lambda lengths_B, *, columns: calls.append(f"start at {columns}"),
    )  # fmt: skip
    captured = CapturedStep(step, memory=memory)
    assert calls == ["restart", "logits"] * 2 + ["logits"]
    cuda.log.clear()
    cuda.current = FakeStream("two", cuda)
    captured.start(np.array([3, 2]), columns=3)
    assert captured.run(torch.tensor([7, 8])).tolist() == [0, 1]
    assert step.token_B.tolist() == [7, 8, 0, 0]
    assert calls[-1] == "start at 3"
    assert cuda.log == [
        *(("wait", "two", "default"), ("record", "two", None)),
        *(("wait", "two", "two"), ("replay", "two", None), ("record", "two", None)),
    ]


def test_a_replay_waits_for_whoever_reads_the_cache_of_the_one_before(cuda: FakeCuda) -> None:
    """The cache is handed out on other streams than the one that replays. Before, the next replay
    of the shape wrote into it while they read."""
    captured = make_pass(GraphMemory(torch.device("cpu")))
    captured.replay()
    streams = {name: FakeStream(name, cuda) for name in ("one", "two")}
    for name in ("one", "two", "one"):
        cuda.current = streams[name]
        captured.lend()
    cuda.log.clear()
    captured.fill({"ids": np.arange(3)})
    assert cuda.log == [("wait", "one", "default"), ("wait", "one", "two")]
    captured.replay()
    cuda.log.clear()
    captured.fill({"ids": np.arange(3)})
    assert cuda.log == [("wait", "one", "one")], "what was read is read"


def test_a_capture_waits_for_the_replay_before_it(cuda: FakeCuda) -> None:
    memory = GraphMemory(torch.device("cpu"))
    make_pass(memory).replay()
    cuda.log.clear()
    cuda.current = FakeStream("two", cuda)
    make_pass(memory)
    assert cuda.log[:2] == [("wait", "two", "default"), ("wait", "capture", "two")]


def test_a_capture_that_fails_leaves_the_process_as_it_was(cuda: FakeCuda) -> None:
    calls = []

    def forward(inputs: Any) -> torch.Tensor:
        calls.append(cuda.generator.state)
        if cuda.generator.state == "capturing":
            raise RuntimeError("operation not permitted when stream is capturing")
        return inputs["ids"]

    memory = GraphMemory(torch.device("cpu"))
    with pytest.raises(RuntimeError, match="operation not permitted"):
        make_pass(memory, forward)
    assert calls == ["fresh", "fresh", "capturing"]
    assert cuda.current.name == "default"
    assert cuda.generator.state == "fresh"
    assert cuda.ended == [(0, (*POOL, 0))]
    assert memory.pool == (*POOL, 1), "torch would still record pinned memory into the old one"
    assert make_pass(memory).replay().tolist() == [0, 2, 4]


def test_what_a_pass_reads_is_kept(cuda: FakeCuda) -> None:
    """A mask, say, that was made before the capture: each replay reads it again."""
    mask = torch.ones(3, dtype=torch.long)
    lives = weakref.ref(mask)
    captured = make_pass(GraphMemory(torch.device("cpu")), partial(masked, mask))
    del mask
    assert lives() is not None
    del captured
    assert lives() is None
