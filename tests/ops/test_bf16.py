"""Which devices are fast at bfloat16, and what follows from it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from latentwire_fast.config.schema import ReaderConfig
from latentwire_fast.ops import bf16
from latentwire_fast.readers import reader as reader_module
from latentwire_fast.readers.reader import Reader


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Every test measures anew."""
    bf16.is_fast_at_bf16.cache_clear()
    yield
    bf16.is_fast_at_bf16.cache_clear()


@pytest.mark.parametrize(("slower", "expected"), [(0.3, True), (1.0, True), (10.0, False)])
def test_a_cpu_is_measured(monkeypatch: pytest.MonkeyPatch, slower: float, expected: bool) -> None:
    times = {torch.bfloat16: slower * 1e-3, torch.float32: 1e-3}
    monkeypatch.setattr(bf16, "_seconds", lambda x, y: times[x.dtype])
    assert bf16.is_fast_at_bf16("cpu") == expected


def test_the_measurement_takes_milliseconds() -> None:
    x = torch.ones(64, 512)
    assert 0 < bf16._seconds(x, x.T.contiguous()) < 1


def test_a_gpu_says_so_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def answer(*, including_emulation: bool) -> bool:
        asked.append(including_emulation)
        return False

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", answer)
    assert not bf16.is_fast_at_bf16("cuda")
    assert asked == [False]


@pytest.mark.parametrize(("fast", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_reader_computes_in_what_is_fast(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch, fast: bool, dtype: torch.dtype
) -> None:
    """And is known by the same weights everywhere."""
    monkeypatch.setattr(reader_module, "is_fast_at_bf16", lambda device_type: fast)
    reader = Reader.from_config("llama", ReaderConfig(str(llama_folder), compute_dtype="auto"))
    plain = Reader.from_config("llama", ReaderConfig(str(llama_folder)))
    assert reader.model.dtype == dtype
    assert reader.fingerprint == plain.fingerprint
