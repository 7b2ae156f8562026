"""What an encoder does not read is counted, and said before training and beside the scores."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from latentwire_fast.config.schema import DataConfig, Mode, RunConfig
from latentwire_fast.data.examples import Example
from latentwire_fast.data.streams import ExampleStream, TestbedStream
from latentwire_fast.errors import DataError
from latentwire_fast.evaluation.pipeline import evaluate_run
from latentwire_fast.models.encoders.base import build_encoder
from latentwire_fast.models.encoders.byte import ByteEncoder
from latentwire_fast.models.encoders.lm import LMEncoder
from latentwire_fast.models.encoders.truncation import Truncation, measure_truncation
from latentwire_fast.prompts.builder import context_text, full_text, question_text
from latentwire_fast.readers.reader import Reader
from latentwire_fast.registry import ENCODERS, POOLERS
from latentwire_fast.training.builders import warn_of_truncation
from readers import tiny_interlingua
from runs import squad_file, tiny_config, train

pytestmark = pytest.mark.usefixtures("on_the_cpu")

LONG = "Nulnak is already 94 years old. " * 6
SHORT = "The dog of Bakrim is named Fosvun."
PAIRS = [(SHORT, "Who?"), (LONG, "How old is Nulnak?"), (LONG, "Who?")]


def lm_encoder(reader: Reader, *, max_tokens: int) -> LMEncoder:
    options = {"latents": 3, "d_z": 8, "source": reader.source, "max_tokens": max_tokens}
    config = ENCODERS.config("lm", pooler=POOLERS.config("spans"), **options)
    encoder = build_encoder(config, {reader.name: reader})
    assert isinstance(encoder, LMEncoder)
    return encoder.eval()


def byte_encoder(*, max_bytes: int) -> ByteEncoder:
    return ByteEncoder(ENCODERS.config("byte", max_bytes=max_bytes, width=16, layers=1))


# --- counting -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["context", "pure"])
def test_tokens_beyond_the_limit_are_counted(readers: dict[str, Reader], mode: Mode) -> None:
    ids = readers["llama"].prompts.text_ids
    texts = [full_text(*p) if mode == "pure" else context_text(p[0]) for p in PAIRS]
    lengths = [len(ids(text)) for text in texts]
    limit = lengths[0]
    assert max(lengths) > limit
    over = sum(length - limit for length in lengths)
    encoder = lm_encoder(readers["llama"], max_tokens=limit)
    assert measure_truncation(encoder, PAIRS, mode=mode) == Truncation(
        examples=3, cut=2, share=over / sum(lengths), limit=f"max_tokens={limit}"
    )


@pytest.mark.parametrize("mode", ["context", "pure"])
def test_bytes_beyond_the_limit_are_counted(mode: Mode) -> None:
    texts = [full_text(*p) if mode == "pure" else context_text(p[0]) for p in PAIRS]
    sizes = [len(text.encode()) for text in texts]
    found = measure_truncation(byte_encoder(max_bytes=sizes[0]), PAIRS, mode=mode)
    lost = sum(size - sizes[0] for size in sizes)
    assert (found.examples, found.cut) == (3, 2)
    assert found.share == pytest.approx(lost / sum(sizes))
    assert measure_truncation(byte_encoder(max_bytes=max(sizes)), PAIRS, mode=mode).cut == 0


@torch.no_grad()
def test_what_is_counted_as_cut_is_not_read(readers: dict[str, Reader]) -> None:
    """In pure mode too, where the question is read whatever the context's length."""
    encoder = lm_encoder(readers["llama"], max_tokens=20)
    other = LONG[:-20] + "something else again"
    assert torch.equal(encoder([LONG]), encoder([other]))
    question = ["How old is Nulnak?"]
    assert torch.equal(encoder([LONG], question), encoder([other], question))
    assert not torch.allclose(encoder([LONG], question), encoder([LONG], ["Who?"]), atol=1e-3)
    early = "Bakrim" + LONG
    assert not torch.allclose(encoder([LONG], question), encoder([early], question), atol=1e-3)


@pytest.mark.parametrize("limit", [1, 4, 9, 20, 500])
def test_a_cut_text_keeps_its_question(readers: dict[str, Reader], limit: int) -> None:
    """And its tokens stay beside the characters that they stand for."""
    encoder, context, question = lm_encoder(readers["llama"], max_tokens=limit), LONG, "Who?"
    ids = encoder.prompts.text_ids
    (prompt,) = encoder._prompts([context], [question])
    start = encoder.prompts.content_start
    read = prompt.ids[start : start + prompt.content]
    asked, told = ids(question_text(question)), ids(context_text(context))
    assert len(read) == prompt.content == min(limit, len(told) + len(asked))
    expected = [*told[: max(0, limit - len(asked))], *asked][:limit]
    assert encoder.tokenizer.decode(read) == encoder.tokenizer.decode(expected)
    ends = encoder.text_ends(context, question)
    assert len(ends) == len(read)
    text = full_text(context, question)
    for token, end in zip(read, ends, strict=True):
        assert text[:end].endswith(encoder.tokenizer.decode([token]))


def test_no_examples_are_no_error(readers: dict[str, Reader]) -> None:
    found = measure_truncation(lm_encoder(readers["llama"], max_tokens=9), [], mode="context")
    assert (found.examples, found.cut, found.share) == (0, 0, 0.0)


# --- where it is said ---------------------------------------------------------------------------


def test_training_warns_once_with_the_numbers(caplog: pytest.LogCaptureFixture) -> None:
    examples = [
        Example(str(i), context, question, ("Fosvun",))
        for i, (context, question) in enumerate(PAIRS)
    ]
    encoder = byte_encoder(max_bytes=100)
    config = DataConfig(source="some.json")
    stream = ExampleStream(examples, config, mode="context", seed=0)
    assert len(stream.items) == 2, "two questions share a passage, and both count"
    warn_of_truncation(encoder, stream, "context")
    expected = measure_truncation(encoder, PAIRS, mode="context")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "2 of 3 examples are longer than the encoder reads (max_bytes=100)" in caplog.text
    assert f"{expected.share:.2%} of all text is cut off" in caplog.text
    caplog.clear()
    warn_of_truncation(byte_encoder(max_bytes=2048), stream, "context")
    warn_of_truncation(encoder, TestbedStream(config, mode="context", seed=0), "context")
    assert not caplog.records


@pytest.fixture
def config(llama_folder: Path, tmp_path: Path) -> RunConfig:
    """A run on a file of short passages and one long one in each split."""
    contexts = [f"{name} has a dog. " * n for name in ("Bak", "Nul", "Fos", "Dim") for n in (1, 9)]
    contexts += [f"Passage {i} is short." for i in range(30)]
    examples = [Example(str(i), c, "Who?", (c.split()[0],)) for i, c in enumerate(contexts)]
    config = tiny_config(llama_folder, data={"source": str(squad_file(examples, tmp_path / "d"))})
    return replace(config, encoder=replace(config.encoder, max_tokens=30))


def test_a_run_says_what_it_did_not_read(
    config: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        train(config, tmp_path / "run")
    assert [r.message for r in caplog.records if "training data" in r.message]
    caplog.clear()
    metrics = evaluate_run(tmp_path / "run", progress=False)
    lines = (tmp_path / "run" / "eval" / "predictions.jsonl").read_text().splitlines()
    contexts = [json.loads(line)["context"] for line in lines]
    cut = sum(len(context) > 100 for context in contexts)
    assert cut, "the held-out split needs a long passage"
    assert metrics["truncated"]["examples"] == cut
    assert 0 < metrics["truncated"]["text_share"] < 1
    assert f"{cut} of {len(contexts)} texts are longer than the encoder reads" in (
        tmp_path / "run" / "eval" / "report.md"
    ).read_text().replace("\\", "")
    assert "held-out data" in caplog.text


def test_one_text_to_be_sent_is_refused_instead(readers: dict[str, Reader]) -> None:
    model = tiny_interlingua(readers, "context")
    limit = model.encoder_config.max_bytes
    assert len(model.encode_payloads(["x" * (limit - len(context_text("")))])) == 1
    with pytest.raises(DataError, match=f"the encoder reads {limit:,}"):
        model.encode_payloads([SHORT, "x" * limit])
