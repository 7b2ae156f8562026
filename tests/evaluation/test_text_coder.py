"""Texts coded by a reader: as short as it expects them, and the same again."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from latentwire_fast.data.examples import Example
from latentwire_fast.errors import PayloadError
from latentwire_fast.evaluation.coded_text import sample_size
from latentwire_fast.evaluation.text_coder import TextCoder
from latentwire_fast.prompts.builder import Turn, full_text
from latentwire_fast.readers.reader import Reader
from latentwire_fast.wire import range_coder
from latentwire_fast.wire.frequencies import whole_frequencies
from latentwire_fast.wire.range_stream import StreamDecoder

TEXTS = ("Gargok owns a lamp.", "Zoë\u2019s  caf\u00e9\nIs closed: 1,5 €", "")


@pytest.fixture(params=["llama", "qwen"])
def reader(request: pytest.FixtureRequest, readers: dict[str, Reader]) -> Reader:
    return readers[request.param]


@pytest.mark.parametrize("mode", ["context", "pure"])
def test_what_is_decoded_is_the_text(reader: Reader, mode: str) -> None:
    coder = TextCoder(reader, mode=mode)  # type: ignore[arg-type]
    texts = TEXTS if mode == "context" else [full_text(text, "Who?") for text in TEXTS]
    rows = coder.ids(texts)
    for text, ids, bits in zip(texts, rows, coder.bits(rows), strict=True):
        message = coder.encode(ids)
        assert coder.decode(message) == ids
        if reader.name == "llama":  # a byte-level tokenizer loses nothing
            assert coder.text(ids) == text
        # Probabilities below 2^-32 are rounded up, others a little down.
        assert len(message) <= bits / 8 * 1.01 + 1.5
        assert len(message) >= 0.6 * bits / 8 - 1


def test_bits_are_those_of_the_text_where_a_prompt_has_it(
    reader: Reader, examples: list[Example]
) -> None:
    context = examples[0].context
    coder = TextCoder(reader, mode="context")
    (ids,) = coder.ids([context])
    (bits,) = coder.bits([ids])
    prompt = reader.prompts.build([Turn("Who?")], context=context)
    start = reader.prompts.content_start + len(reader.prompts.label_ids)
    assert prompt.ids[start : start + len(ids)] == ids
    with torch.no_grad():
        logits_TV = reader.of_tokens(reader.model(torch.tensor([prompt.ids])).logits[0])
    log_TV = logits_TV[start - 1 :].double().log_softmax(-1) / -math.log(2)
    expected = sum(log_TV[t, token].item() for t, token in enumerate(ids))
    ends = [log_TV[len(ids), end].item() for end in coder.ends]
    assert prompt.ids[start + len(ids)] == coder.ends[0]
    expected += min(ends[0] - math.log2(15 / 16), ends[1] + 4)
    assert bits == pytest.approx(expected, rel=1e-4)


def test_a_text_that_holds_the_token_behind_it_ends_with_another(reader: Reader) -> None:
    coder = TextCoder(reader, mode="context")
    (ids,) = coder.ids(["one\ntwo"])
    assert coder.ends[0] in ids
    assert coder.decode(coder.encode(ids)) == ids


def test_other_logits_are_noticed_or_give_another_text(
    readers: dict[str, Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing else can be promised of bytes that another reader coded."""
    monkeypatch.setattr("latentwire_fast.evaluation.text_coder.MOST_TOKENS", 20)
    ours, theirs = (TextCoder(reader, mode="context") for reader in readers.values())
    (ids,) = ours.ids(["Gargok owns a brown lamp and a green chair."])
    message = ours.encode(ids)
    try:
        found = theirs.decode(message)
    except PayloadError:
        return
    assert theirs.encode(found) == message  # canonical all the same


def test_a_text_without_end_is_refused(
    readers: dict[str, Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
    coder = TextCoder(readers["llama"], mode="context")
    (ids,) = coder.ids(["a lamp, a chair, a box"])
    message = coder.encode(ids)
    monkeypatch.setattr("latentwire_fast.evaluation.text_coder.MOST_TOKENS", len(ids) - 1)
    with pytest.raises(PayloadError, match="no text that this reader coded"):
        coder.decode(message)


def test_the_stream_decoder_reads_what_the_encoder_writes() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        rows, symbols = [], []
        for _ in range(int(rng.integers(1, 40))):
            size = int(rng.integers(1, 300))
            weights = rng.random(size) ** 20 + 1e-30
            rows.append([0, *np.cumsum(whole_frequencies(weights)).tolist()])
            symbols.append(int(rng.choice(size, p=weights / weights.sum())))
        message = range_coder.encode(symbols, range_coder.Rows(rows))
        stream = StreamDecoder(message)
        assert [stream.symbol(row) for row in rows] == symbols
        stream.finish()
        for other in (message + b"\1", message[:-1], bytes([255, 255]) + message):
            stream = StreamDecoder(other)
            try:
                found = [stream.symbol(row) for row in rows]
                stream.finish()
            except PayloadError:
                continue
            assert range_coder.encode(found, range_coder.Rows(rows)) == other


@pytest.mark.parametrize(
    ("tokens", "count", "expected"),
    [([42] * 20, 16, 8), ([42] * 20, 3, 3), ([100] * 9, 16, 5), ([9000, 1], 4, 1), ([], 4, 0)],
)
def test_long_texts_are_fewer(tokens: list[int], count: int, expected: int) -> None:
    """Coding one takes two steps of the reader per token, in every evaluation."""
    assert sample_size(tokens, count) == expected
