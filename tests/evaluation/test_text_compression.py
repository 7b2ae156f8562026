"""General compressors: what each text takes by itself."""

from __future__ import annotations

import zlib
from dataclasses import replace

import pytest

from latentwire_fast import wire
from latentwire_fast.config.presets import PRESETS
from latentwire_fast.data.testbed import make_examples
from latentwire_fast.evaluation import pipeline, text_compression
from latentwire_fast.evaluation.text_compression import TextSizes, Zstd

TEXTS = [example.context for example in make_examples(6, seed=3)]
TRAINING = [example.context for example in make_examples(400, seed=4)]


def test_sizes_without_zstd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_compression, "find_spec", lambda name: None)
    sizes = TextSizes.of(TEXTS, training_texts=TRAINING)
    assert sizes.utf8 == [len(text.encode()) for text in TEXTS]
    assert sizes.zlib == [len(zlib.compress(text.encode(), 9)) for text in TEXTS]
    assert sizes.brotli == [wire.brotli_bytes(text) for text in TEXTS]
    assert sizes.zstd == sizes.zstd_dictionary == []
    assert set(sizes.not_measured) == {"zstd", "zstd_dictionary"}
    assert "not installed" in sizes.not_measured["zstd"]


def test_a_dictionary_makes_short_texts_shorter() -> None:
    pytest.importorskip("zstandard")
    sizes = TextSizes.of(TEXTS, training_texts=TRAINING)
    assert not sizes.not_measured
    assert sizes.dictionary["texts"] == 400
    assert 0 < sizes.dictionary["bytes"] <= text_compression.DICTIONARY_BYTES
    assert all(0 < a < b for a, b in zip(sizes.zstd_dictionary, sizes.zstd, strict=True))


def test_a_frame_without_its_magic_number_is_what_counts() -> None:
    zstandard = pytest.importorskip("zstandard")
    parameters = zstandard.ZstdCompressionParameters.from_level(
        text_compression.ZSTD_LEVEL,
        format=zstandard.FORMAT_ZSTD1_MAGICLESS,
        write_content_size=0,
        write_checksum=0,
    )
    plain = zstandard.ZstdCompressor(compression_params=parameters)
    for text in TEXTS:
        assert abs(Zstd().size(text) - len(plain.compress(text.encode()))) <= 1


def test_training_data_that_is_gone_costs_the_dictionary_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An evaluation has no other need of it."""
    config = PRESETS["testbed_smoke"]()
    gone = replace(config, data=replace(config.data, source="squad=/nowhere/train.json"))
    monkeypatch.setattr(pipeline, "why_no_zstd", lambda: None)
    assert "cannot be read" in pipeline.dictionary_texts(gone)
    texts = pipeline.dictionary_texts(replace(config, mode="pure"))
    assert len(texts) == text_compression.DICTIONARY_TEXTS
    assert all("\nQuestion: " in text for text in texts)
    monkeypatch.setattr(pipeline, "why_no_zstd", lambda: "it is not installed")
    assert pipeline.dictionary_texts(gone) == ""


def test_why_there_is_no_dictionary() -> None:
    pytest.importorskip("zstandard")
    sizes = TextSizes.of(TEXTS, training_texts="the training data cannot be read")
    assert sizes.not_measured == {"zstd_dictionary": "the training data cannot be read"}
    few = TextSizes.of(TEXTS, training_texts=TEXTS[:1])
    assert "1 training texts make no dictionary" in few.not_measured["zstd_dictionary"]
    assert few.zstd
