"""What of a request of lm-evaluation-harness a payload stands for. The harness is not needed."""

from __future__ import annotations

import logging
import sys

import pytest

from latentwire_fast.errors import ConfigError, DataError
from latentwire_fast.evaluation.harness import register
from latentwire_fast.evaluation.harness.context_payloads import ContextPayloads
from latentwire_fast.evaluation.harness.request_prompts import RequestPrompts
from latentwire_fast.evaluation.harness.requests import RequestParts, split_request, whole_question
from latentwire_fast.prompts.builder import Turn
from latentwire_fast.readers.reader import Reader
from readers import tiny_interlingua

DOC = {"context": " Nulnak is 94. ", "question": "Who?", "number": 3}
REQUEST = "Context: Nulnak is 94.\nQuestion: Who?\nAnswer:"


def test_the_context_is_cut_out() -> None:
    parts = split_request(REQUEST, DOC, field="context")
    assert parts == ("Context:", "Nulnak is 94.", "\nQuestion: Who?\nAnswer:")


def test_examples_before_it_stay_text() -> None:
    shots = f"{REQUEST} Nulnak\n\n"  # on the same passage
    parts = split_request(shots + REQUEST, DOC, field="context")
    assert parts.before == f"{shots}Context:"
    assert parts.after == "\nQuestion: Who?\nAnswer:"


@pytest.mark.parametrize("field", ["passage", "number", "empty"])
def test_a_field_without_text_is_refused(field: str) -> None:
    with pytest.raises(DataError, match=r"task 'boolq': .*context_field=NAME \(it has \['context"):
        split_request(REQUEST, {**DOC, "empty": " "}, field=field, task="boolq")


def test_a_context_that_is_not_there_is_refused() -> None:
    with pytest.raises(DataError, match="not in the request word for word"):
        split_request("Q: Who?", DOC, field="context")


def test_pure_mode_sends_the_rest_as_the_question() -> None:
    parts = split_request(REQUEST, DOC, field="context")
    assert whole_question(parts, anchor="Answer:") == "Who?"
    shots = RequestParts("Q: 1+1? A: 2\n\nContext:", "c", "\nQuestion: Who?\nAnswer:")
    assert whole_question(shots, anchor="Answer:") == "Q: 1+1? A: 2\nWho?"
    assert whole_question(parts, anchor="") == "Who?\nAnswer:"


def request_of(reader: Reader) -> RequestParts:
    """The request that a task in this project's own words makes, with the reader's template."""
    template = reader.tokenizer.chat_template
    text = REQUEST
    if template:
        message = {"role": "user", "content": REQUEST.removesuffix("\nAnswer:")}
        text = reader.tokenizer.apply_chat_template(
            [message], tokenize=False, add_generation_prompt=True
        )
        text += "Answer:"
    return split_request(text, DOC, field="context")


def test_prompts_are_those_of_training(reader: Reader, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        prompts = RequestPrompts(reader, "context")
        parts = request_of(reader)
        asked, scored = prompts.prompt(parts), prompts.prompt(parts, " Nulnak")
    wanted = reader.prompts.build([Turn("Who?")], context=None, latent="context")
    assert (asked.ids, asked.latent_at) == (wanted.ids, wanted.latent_at)
    assert not any(asked.is_target)
    answered = reader.prompts.build([Turn("Who?", "Nulnak")], context=None, latent="context")
    assert scored.ids == answered.ids[:-1], "without EOS"
    assert scored.is_target == answered.is_target[:-1]
    assert not caplog.messages
    assert prompts.key(parts) == ("Nulnak is 94.", None)


def test_pure_prompts_are_those_of_training(reader: Reader) -> None:
    prompts = RequestPrompts(reader, "pure")
    parts = split_request(REQUEST, DOC, field="context")
    wanted = reader.prompts.build([Turn("Who?")], context="", latent="pure")
    asked = prompts.prompt(parts, " Nulnak")
    assert asked.ids[: len(wanted.ids)] == wanted.ids
    assert asked.latent_at == wanted.latent_at
    assert sum(asked.is_target) == len(asked.ids) - len(wanted.ids)
    assert prompts.key(parts) == ("Nulnak is 94.", "Who?")


def test_spaces_before_a_continuation_belong_to_it(reader: Reader) -> None:
    prompts = RequestPrompts(reader, "context")
    ids = [
        prompts.prompt(RequestParts("Context:", "c", f"\nAnswer:{before}"), continuation)
        for before, continuation in (("", " Nulnak"), (" ", "Nulnak"))
    ]
    assert ids[0] == ids[1]


def test_another_place_is_said_or_refused(
    readers: dict[str, Reader], caplog: pytest.LogCaptureFixture
) -> None:
    reader = Reader(readers["llama"].model, readers["llama"].tokenizer, name="llama")
    parts = RequestParts("Passage:", "c", "\nQ: Who?\nA:")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            RequestPrompts(reader, "context").prompt(parts)
    assert len(caplog.messages) == 1
    assert "Passage:" in caplog.text
    with pytest.raises(ConfigError, match="doc_to_text must begin with them"):
        RequestPrompts(reader, "context", head=4).prompt(parts)


@pytest.mark.parametrize("chunk_length", [None, 24])
def test_each_context_is_encoded_once(
    readers: dict[str, Reader], monkeypatch: pytest.MonkeyPatch, chunk_length: int | None
) -> None:
    model = tiny_interlingua(readers, "context")
    sent = ContextPayloads(model, bits=4, chunk_length=chunk_length, batch_size=2)
    texts = ["Nulnak is 94. Velna is 12.", "Torin is 7.", "Nulnak is 94. Velna is 12."]
    messages = sent.of([(text, None) for text in texts])
    assert messages[0] == messages[2]
    assert len(messages[0]) == (1 if chunk_length is None else 2)
    monkeypatch.setattr(model, "encode", lambda *_: pytest.fail("encoded again"))
    assert sent.of([(texts[1], None)]) == messages[1:2]
    found = sent.summary()
    assert found["contexts"] == 2
    assert found["payload_bytes_mean"] == sum(len(p) for m in messages[:2] for p in m) / 2
    assert found["text_utf8_bytes_mean"] == sum(map(len, texts[:2])) / 2
    assert ContextPayloads(model).summary() == {"contexts": 0}


def test_without_the_harness_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not installed
    with pytest.raises(ConfigError, match=r"pip install 'latentwire-fast\[harness\]'"):
        register()
