"""Device maps by the number of GPUs, without any: on paper, and on the meta device."""

from __future__ import annotations

import logging

import pytest
import torch
from accelerate import infer_auto_device_map
from transformers import LlamaConfig, LlamaForCausalLM

from latentwire_fast.errors import ConfigError
from latentwire_fast.readers.device_maps import placement, warn_of_idle_cards

GIB = 2**30


@pytest.fixture(autouse=True)
def _two_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "accelerate.utils.get_max_memory", lambda: {0: 70 * GIB, 1: 70 * GIB, "cpu": 99 * GIB}
    )
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def test_no_map_is_no_option_and_a_map_is_passed_on() -> None:
    assert placement(None, None) == {}
    assert placement("auto", None) == {"device_map": "auto"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("20GiB", {0: 20 * GIB, 1: 20 * GIB, "cpu": 99 * GIB}),
        ("90GiB", {0: 70 * GIB, 1: 70 * GIB, "cpu": 99 * GIB}),
        ("0=20GiB,1=40GB", {0: 20 * GIB, 1: 40 * 10**9}),
        ("0=500MiB, cpu=2GiB", {0: 500 * 2**20, "cpu": 2 * GIB}),
    ],
)
def test_memory_is_read(text: str, expected: dict[int | str, int]) -> None:
    assert placement("auto", text) == {"device_map": "auto", "max_memory": expected}


@pytest.mark.parametrize(
    ("device_map", "max_memory", "message"),
    [
        (None, "20GiB", "needs a device map"),
        ("auto", "much", "'much' is no size; write 20GiB"),
        ("auto", "0=20", "'20' is no size"),
        ("auto", "0=20GiB,", "'' is no size"),
        ("auto", "gpu0=20GiB", "no device 'gpu0'; write 0, 1"),
    ],
)
def test_what_is_no_memory_is_refused(device_map: object, max_memory: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        placement(device_map, max_memory)


def test_several_processes_share_no_map(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert placement(None, None) == {}
    with pytest.raises(ConfigError, match="each of several processes takes one GPU"):
        placement("auto", None)


def test_a_reader_is_spread_as_its_memory_says() -> None:
    config = LlamaConfig(vocab_size=64, hidden_size=256, intermediate_size=512, num_hidden_layers=8)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    layer = 4 * sum(p.numel() for p in model.model.layers[0].parameters())

    def spread(text: str) -> list[object]:
        memory = placement("auto", text)["max_memory"]
        found = infer_auto_device_map(model, memory, no_split_module_classes=["LlamaDecoderLayer"])
        return [found[f"model.layers.{i}"] for i in range(8)]

    parts = spread(f"0={6 * layer // 2**10}KiB,1={6 * layer // 2**10}KiB,cpu=1GiB")
    assert parts[0] == 0
    assert set(parts) == {0, 1}
    parts = spread(f"0={4 * layer // 2**10}KiB,1={3 * layer // 2**10}KiB,cpu=1GiB")
    assert set(parts) == {0, 1, "cpu"}


@pytest.mark.parametrize(
    ("devices", "cards", "idle"),
    [
        (["cuda:0"], 2, "GPU 1 of 2"),
        (["cuda:0", "cuda:3"], 4, "GPU 1, 2 of 4"),
        (["cuda:0", "cuda:1", "cpu"], 2, None),
        (["cuda:0"], 1, None),
        (["cpu"], 2, None),
    ],
)
def test_an_idle_card_is_said_once(
    devices: list[str], cards: int, idle: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    warn_of_idle_cards((torch.device(d) for d in devices), cards=cards)
    assert len(caplog.records) == (idle is not None)
    assert idle is None or f"no reader is on {idle}: device_map=auto" in caplog.text
