"""The method `hybrid`: the beginning of a context as text, a payload of the rest."""

from __future__ import annotations

import pytest
import torch

from latentwire_fast.config.schema import EvalConfig
from latentwire_fast.data.examples import Example
from latentwire_fast.errors import ConfigError
from latentwire_fast.evaluation.methods.base import (
    EvaluationCase,
    MethodInput,
    evaluation_methods,
    unanswered,
)
from latentwire_fast.evaluation.methods.hybrid import first_words
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.prompts.builder import context_text
from latentwire_fast.readers.reader import Reader
from latentwire_fast.serving import Receiver
from readers import tiny_interlingua
from receiving import at_most, make_model

BITS, TOKENS = 6, 9
EXAMPLES = [
    Example("a", "Nulnak lives in Bakrim. Fosvun has a red lamp.", "Where?", ("Bakrim",)),
    Example("b", "Nulnak is 7.", "How old is Nulnak?", ("7",)),
]


def built(model: Interlingua, reader: Reader, tokens: int | None = TOKENS) -> MethodInput:
    with torch.no_grad():
        payloads = model.encode_payloads([e.context for e in EXAMPLES], bits=BITS)
        case = EvaluationCase(model, reader, EXAMPLES, {BITS: [*payloads]}, hybrid_tokens=tokens)
        method = evaluation_methods()["hybrid"]
        assert method.fits(case) == (tokens is not None and model.mode == "context")
        return method.build(case, range(2), bits=BITS)


def test_whole_words_that_fit(reader: Reader) -> None:
    context = EXAMPLES[0].context
    label = len(reader.prompts.label_ids)
    for tokens in range(1, 40):
        text = first_words(reader, context, tokens=tokens)
        assert context.startswith(text)
        assert text == context or not text or context[len(text)].isspace()
        assert len(reader.prompts.text_ids(context_text(text))) - label <= tokens or not text
    assert text == context


def test_text_stands_before_the_latent_and_both_are_counted(reader: Reader) -> None:
    model = tiny_interlingua({reader.name: reader}, "context")
    inputs = built(model, reader)
    assert inputs.payloads is not None
    for example, prompt, payload, size, positions in zip(
        EXAMPLES,
        inputs.prompts,
        inputs.payloads,
        inputs.sent_bytes,
        inputs.positions,
        strict=True,
    ):
        text = first_words(reader, example.context, tokens=TOKENS)
        rest = example.context[len(text) :].strip()
        assert [payload] == model.encode_payloads([rest], bits=BITS)
        assert size == len(text.encode()) + len(payload)
        at = prompt.latent_at
        assert at is not None
        before = reader.prompts.build_context(text).ids
        assert prompt.ids[:at] == before
        head = reader.prompts.content_start + len(reader.prompts.label_ids)
        assert positions == at - head + model.positions
    answers = Receiver.of(model, reader).generate(
        [unanswered(prompt) for prompt in inputs.prompts],
        payloads=inputs.payloads,
        options=at_most(3),
    )
    assert len(answers) == 2


def test_without_text_it_is_the_latent(reader: Reader) -> None:
    """One token is no whole word here: nothing is left to send as text."""
    model = make_model(reader, "both")
    inputs = built(model, reader, tokens=1)
    plain = evaluation_methods()["latent"].build(
        EvaluationCase(model, reader, EXAMPLES, {BITS: inputs.payloads or []}), range(2), bits=BITS
    )
    assert inputs.prompts == plain.prompts
    assert inputs.positions == plain.positions
    assert inputs.sent_bytes == [len(payload) for payload in inputs.payloads or []]


def test_it_is_measured_where_a_number_is_set(reader: Reader) -> None:
    model = tiny_interlingua({reader.name: reader}, "pure")
    case = EvaluationCase(model, reader, EXAMPLES, {}, hybrid_tokens=4)
    assert not evaluation_methods()["hybrid"].fits(case)
    with pytest.raises(ConfigError, match="hybrid_tokens=0"):
        EvalConfig(hybrid_tokens=0)
