"""The probe's outcome is kept once per digest of weights, and costs nothing where it cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from latentwire_fast.errors import ConfigError
from latentwire_fast.files.user_cache import VARIABLE
from latentwire_fast.readers import probe_cache
from latentwire_fast.readers.abilities import ReaderAbilities
from latentwire_fast.readers.reader import Reader
from readers import tiny_model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    return tmp_path / "probes"


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry for each probe that is made."""
    made: list[Any] = []
    plain = probe_cache.probe

    def counted(subject: Any) -> ReaderAbilities:
        made.append(subject)
        return plain(subject)

    monkeypatch.setattr(probe_cache, "probe", counted)
    return made


def new_reader(tokenizer: PreTrainedTokenizerFast, **options: Any) -> Reader:
    return Reader(tiny_model("llama", tokenizer, **options), tokenizer, name="llama")


def test_the_same_weights_are_probed_once(
    cache: Path, probes: list[Any], llama_folder: Path, llama_tokenizer: PreTrainedTokenizerFast
) -> None:
    for _ in range(2):
        assert Reader.load(llama_folder, name="llama").abilities == ReaderAbilities()
    assert len(probes) == len([*cache.iterdir()]) == 1
    assert new_reader(llama_tokenizer, seed=1).abilities == ReaderAbilities()
    half = Reader.load(llama_folder, name="llama", dtype=torch.bfloat16)
    assert half.abilities == ReaderAbilities()
    assert len(probes) == 3, "other weights, and another dtype"


def test_another_dtype_later_is_probed_again(
    cache: Path, probes: list[Any], llama_folder: Path
) -> None:
    reader = Reader.load(llama_folder, name="llama")
    reader.compute_in(torch.bfloat16)
    assert reader.abilities == ReaderAbilities()
    assert [subject.model.dtype for subject in probes] == [torch.bfloat16] * 2, "of one model"
    assert len([*cache.iterdir()]) == 2


@pytest.mark.parametrize("content", ["", "{", "[]", '{"reads": 1}', '{"soft": ""}'])
def test_a_damaged_file_is_made_again(
    cache: Path, probes: list[Any], llama_tokenizer: PreTrainedTokenizerFast, content: str
) -> None:
    assert new_reader(llama_tokenizer).abilities
    (path,) = cache.iterdir()
    path.write_text(content)
    assert new_reader(llama_tokenizer).abilities == ReaderAbilities()
    assert len(probes) == 2
    assert json.loads(path.read_text())["reads"] == ""


def test_a_cache_that_cannot_be_written_to_costs_the_probe_alone(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    probes: list[Any],
    llama_tokenizer: PreTrainedTokenizerFast,
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "file"))
    for _ in range(2):
        assert new_reader(llama_tokenizer).abilities == ReaderAbilities()
    assert len(probes) == 2


def test_a_refusal_is_kept_too(
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    probes: list[Any],
    llama_tokenizer: PreTrainedTokenizerFast,
) -> None:
    """A model whose attention looks ahead reads a padded batch in another way than a text."""
    for _ in range(2):
        model = tiny_model("llama", llama_tokenizer)
        for layer in model.model.layers:
            plain = layer.forward
            monkeypatch.setattr(
                layer,
                "forward",
                lambda x, *a, plain=plain, **k: plain(x, *a, **k) + x.mean(1, True),
            )
        reader = Reader(model, llama_tokenizer, name="ahead")
        with pytest.raises(
            ConfigError,
            match=r"reader 'ahead' \(llama\) cannot be used: in a batch padded on the right it "
            r"computes something else than for the text alone \(off by .*\); choose another",
        ):
            assert reader.abilities
    assert len(probes) == 1
