"""A prefill's result on another stream, and receivers in several threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from latentwire_fast.errors import ConfigError
from latentwire_fast.readers.reader import Reader
from latentwire_fast.serving import Receiver
from latentwire_fast.serving.streams import Finished
from receiving import asking, at_most, make_model, random_payloads

QUESTIONS = ["Where does Nulnak live?", "What?", "What is the job of Selpon, if any?"]


class FakeStream:
    def __init__(self, name: str, log: list[Any]) -> None:
        self.name, self.log = name, log

    def record_event(self) -> str:
        return f"what {self.name} did"

    def wait_event(self, event: str) -> None:
        self.log.append((self.name, "waits for", event))


def test_who_goes_on_on_another_stream_waits_and_keeps_the_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two devices; the second one's stream stays the same."""
    log: list[Any] = []
    devices = [torch.device("cuda", number) for number in range(2)]
    current = {device: FakeStream(f"{device} one", log) for device in devices}
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: current[device])
    tensors: list[Any] = [
        SimpleNamespace(device=device, record_stream=lambda s, d=device: log.append((d.index, s)))
        for device in (*devices, torch.device("cpu"))
    ]
    finished = Finished(tensors)
    finished.hand_over(tensors)
    assert log == []
    current[devices[0]] = other = FakeStream("cuda:0 two", log)
    finished.hand_over(tensors)
    assert log == [("cuda:0 two", "waits for", "what cuda:0 one did"), (0, other)]


@pytest.mark.usefixtures("engine")
def test_threads_share_a_receiver(reader: Reader) -> None:
    """Each gets the answers that it gets alone: before, another thread's prefill of the same shape
    took a graph's cache away while the first was decoding."""
    model = make_model(reader, "both")
    receiver, prompts = Receiver.of(model, reader), asking(reader, QUESTIONS)
    batches = [random_payloads(model) for _ in range(4)]

    def ask(payloads: list[bytes]) -> list[list[int]]:
        return receiver.generate(prompts, payloads=payloads, options=at_most(4))

    expected = [ask(payloads) for payloads in batches]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(ask, batches * 2)) == expected * 2


@pytest.mark.usefixtures("uncaptured")
def test_a_prefill_waits_while_another_thread_decodes(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read before that is then refused, as in one thread."""
    model = make_model(reader)
    receiver, prompts = Receiver.of(model, reader), asking(reader, QUESTIONS)
    payloads = random_payloads(model)
    expected = receiver.generate(prompts, payloads=payloads, options=at_most(3))
    first = receiver.prefill(prompts, payloads=payloads)
    logits_of, started = reader.logits, []

    def logits_while_others_ask(hidden: torch.Tensor) -> torch.Tensor:
        if not started:
            started.append(threads.submit(receiver.prefill, prompts, payloads=payloads[::-1]))
        return logits_of(hidden)

    with ThreadPoolExecutor(1) as threads:
        monkeypatch.setattr(reader, "logits", logits_while_others_ask)
        assert first.generate(at_most(3)) == expected
        started[0].result()
    with pytest.raises(ConfigError, match="overwritten"):
        first.generate(at_most(3))


def test_reading_without_low_rank_updates_is_for_one_thread(reader: Reader) -> None:
    with ThreadPoolExecutor(1) as threads:
        with reader.base():
            assert not threads.submit(reader.lock.acquire, timeout=0.05).result()
        assert threads.submit(reader.lock.acquire, timeout=5).result()
        threads.submit(reader.lock.release).result()


@pytest.mark.gpu
def test_a_cache_that_another_stream_reads_is_not_overwritten(llama_folder: Path) -> None:
    """A slow reader of the cache on one stream; prefills of the same shape on another."""
    reader = Reader.load(llama_folder, name="llama", device="cuda:0")
    model = make_model(reader, "both").cuda()
    receiver, prompts = Receiver.of(model, reader), asking(reader, QUESTIONS)
    payloads = random_payloads(model)
    expected = receiver.prefill(prompts, payloads=payloads).cache.layers[1].values.clone()
    others = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    for _ in range(3):
        with torch.cuda.stream(others[0]):
            torch.cuda._sleep(20_000_000)
            first = receiver.prefill(prompts, payloads=payloads)
        with torch.cuda.stream(others[1]):
            values = first.cache.layers[1].values
            torch.cuda._sleep(20_000_000)
            found = values.clone()
        with torch.cuda.stream(others[0]):
            receiver.prefill(prompts, payloads=payloads[::-1])
        torch.cuda.synchronize()
        assert torch.equal(found, expected)
