"""Long texts in chunks: exact limits, sentence ends, nothing lost."""

from __future__ import annotations

import random

import pytest

from latentwire_fast.data.testbed import make_passage
from latentwire_fast.errors import ConfigError, DataError
from latentwire_fast.models.encoders.base import Encoder, build_encoder
from latentwire_fast.models.encoders.chunks import cut_into_chunks
from latentwire_fast.prompts.builder import encoded_text
from latentwire_fast.readers.reader import Reader
from latentwire_fast.registry import ENCODERS, POOLERS


@pytest.fixture(params=["byte", "lm"])
def encoder(request: pytest.FixtureRequest, readers: dict[str, Reader]) -> Encoder:
    shape = {"latents": 4, "d_z": 8}
    if request.param == "byte":
        return build_encoder(ENCODERS.config("byte", width=16, layers=1, heads=2, **shape), {})
    llama = readers["llama"]
    config = ENCODERS.config("lm", source=llama.source, pooler=POOLERS.config("spans"), **shape)
    return build_encoder(config, readers)


def words(text: str) -> list[str]:
    return text.split()


@pytest.mark.parametrize("question", [None, "Where does Nulnak live?"])
@pytest.mark.parametrize("parts", [2, 5])
def test_chunks_end_with_sentences_and_are_as_long_as_can_be(
    encoder: Encoder, question: str | None, parts: int
) -> None:
    text = make_passage(random.Random(0), facts=16).context
    beside = encoder.length_of(encoded_text("", question))
    length = beside + encoder.length_of(text) // parts
    chunks = cut_into_chunks(encoder, text, question, length=length)
    assert len(chunks) > 1
    assert " ".join(chunks) == text
    for chunk, following in zip(chunks, [*chunks[1:], ""], strict=True):
        assert chunk.endswith(".")
        assert encoder.length_of(encoded_text(chunk, question)) <= length
        if following:
            longer = f"{chunk} {following.split('.')[0]}."
            assert encoder.length_of(encoded_text(longer, question)) > length


def test_what_has_no_sentence_end_is_cut_between_words_or_within_them(encoder: Encoder) -> None:
    many = " ".join(f"word{number}" for number in range(60))
    chunks = cut_into_chunks(encoder, many, length=70)
    assert words(" ".join(chunks)) == words(many)
    long_word = "x" * 400
    chunks = cut_into_chunks(encoder, long_word, length=70)
    assert "".join(chunks) == long_word
    assert len(chunks) > 1
    for chunk in chunks:
        assert encoder.length_of(encoded_text(chunk, None)) <= 70


def test_a_text_that_fits_is_one_chunk(encoder: Encoder) -> None:
    text = "Nulnak lives in Bakrim. Is he a baker? Yes."
    assert cut_into_chunks(encoder, text, length=encoder.limit.length) == [text]
    exact = encoder.length_of(encoded_text(text, None))
    assert cut_into_chunks(encoder, text, length=exact) == [text]
    assert len(cut_into_chunks(encoder, text, length=exact - 1)) == 2
    assert cut_into_chunks(encoder, "", length=20) == [""]


def test_lengths_that_cannot_be_are_refused(encoder: Encoder) -> None:
    limit = encoder.limit.length
    for length in (0, limit + 1):
        with pytest.raises(ConfigError, match=r"chunk_length=.* expected 1 to"):
            cut_into_chunks(encoder, "Some text.", length=length)
    with pytest.raises(DataError, match="give a larger chunk_length"):
        cut_into_chunks(encoder, "Some text.", "Where " * 30, length=20)
