"""Budgets are kept, controls are controls, and every method asks for the same answer."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from latentwire_fast import wire
from latentwire_fast.config.schema import Mode
from latentwire_fast.data.examples import Example
from latentwire_fast.evaluation.methods.base import (
    EvaluationCase,
    MethodInput,
    by_kind,
    cut_utf8,
    evaluation_methods,
    other_contexts,
    unanswered,
)
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.prompts.builder import (
    CONTEXT_LABEL,
    Prompt,
    context_text,
    full_text,
    question_text,
)
from latentwire_fast.readers.reader import Reader
from latentwire_fast.serving import Receiver
from readers import LORA_METHODS, METHODS, OPTIONAL_METHODS, tiny_interlingua

BITS = 6
LATENTS = 12  # wide enough for some context beside a question, too small for any passage


@pytest.fixture(scope="module", params=["context", "pure"])
def mode(request: pytest.FixtureRequest) -> Mode:
    return request.param


@pytest.fixture(scope="module")
def model(readers: dict[str, Reader], mode: Mode) -> Interlingua:
    return tiny_interlingua(readers, mode, latents=LATENTS)


@pytest.fixture(scope="module")
def payloads(model: Interlingua, mode: Mode, examples: list[Example]) -> list[bytes]:
    questions = [e.question for e in examples] if mode == "pure" else None
    return model.encode_payloads([e.context for e in examples], questions)


@pytest.fixture(scope="module")
def case(
    model: Interlingua, reader: Reader, examples: list[Example], payloads: list[bytes]
) -> EvaluationCase:
    return EvaluationCase(model, reader, examples, {BITS: payloads})


def content(case: EvaluationCase, prompt: Prompt) -> list[int]:
    """The ids that stand for user text in a text prompt."""
    start = case.reader.prompts.content_start
    return prompt.ids[start : start + prompt.content]


def answer(prompt: Prompt) -> list[int]:
    return [token for token, scored in zip(prompt.ids, prompt.is_target, strict=True) if scored]


def build(case: EvaluationCase, name: str) -> MethodInput:
    with torch.no_grad():
        return evaluation_methods()[name].build(case, range(len(case.examples)), bits=BITS)


def prefixes_of(case: EvaluationCase, inputs: MethodInput) -> Tensor | None:
    """The soft prefixes that the reader gets, or None for text."""
    if inputs.embeddings is not None:
        return inputs.embeddings
    if inputs.payloads is None:
        return None
    latent = case.model.decode_payloads(inputs.payloads)
    with torch.no_grad():
        return case.model.prefix(case.reader.name, latent)


# --- every method -------------------------------------------------------------------------------


def test_the_table_holds_every_method(case: EvaluationCase) -> None:
    assert set(evaluation_methods()) == {*METHODS, *LORA_METHODS, *OPTIONAL_METHODS, "first_words"}
    methods = {name: m for name, m in by_kind().items() if name not in OPTIONAL_METHODS}
    assert [method.kind for method in methods.values()] == [
        *["reference"] * 3,
        "ours",
        *["budget"] * 7,
        *["floor"] * 5,
    ]
    of_others = {name for name, method in evaluation_methods().items() if not method.fits(case)}
    wanted = {*LORA_METHODS, *OPTIONAL_METHODS}
    assert of_others == wanted, "the case's reader has no LoRA, and it has no more than it needs"


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_is_a_part_of_the_whole(case: EvaluationCase, name: str) -> None:
    """What an example is given does not depend on how a data set is cut into batches."""
    whole, rows = build(case, name), range(5, 8)
    with torch.no_grad():
        part = evaluation_methods()[name].build(case, rows, bits=BITS)
    assert part.prompts == whole.prompts[5:8]
    assert part.positions == whole.positions[5:8]
    assert part.payloads == (whole.payloads and whole.payloads[5:8])
    assert sum(source is not None for source in (whole.payloads, whole.embeddings)) <= 1


@pytest.mark.parametrize("name", METHODS)
def test_every_method_asks_for_the_same_answer_in_the_same_frame(
    case: EvaluationCase, name: str
) -> None:
    """Template, anchor and gold answer are the text baseline's: only the content differs."""
    inputs, text = build(case, name), build(case, "text")
    start = case.reader.prompts.content_start
    is_text = inputs.payloads is None and inputs.embeddings is None
    assert len(inputs.prompts) == len(inputs.positions) == len(case.examples)
    for prompt, whole in zip(inputs.prompts, text.prompts, strict=True):
        assert answer(prompt) == answer(whole)
        assert prompt.ids[:start] == whole.ids[:start]
        tail = whole.ids[start + whole.content :]
        assert prompt.ids[-len(tail) :] == tail
        assert (prompt.latent_at is None) == is_text


@pytest.mark.parametrize("name", METHODS)
def test_positions_are_those_in_the_latents_place(
    case: EvaluationCase, mode: Mode, name: str
) -> None:
    inputs = build(case, name)
    prefixes = prefixes_of(case, inputs)
    for prompt, positions, prefix, e in zip(
        inputs.prompts,
        inputs.positions,
        [None] * len(inputs.prompts) if prefixes is None else prefixes,
        case.examples,
        strict=True,
    ):
        question = len(case.reader.prompts.text_ids(question_text(e.question)))
        taken = prompt.content if prefix is None else len(prefix)
        # In context mode question and label stay text beside the latent, so they do not count,
        # except where they are themselves part of what is cut.
        beside = mode == "context" and name not in (
            "latent",
            "shuffled_latent",
            "zero_latent",
            "token_budget",
        )
        free = question + len(case.reader.prompts.label_ids)
        assert positions == max(0, taken - (free if beside else 0))


def test_without_its_answer_a_prompt_ends_at_the_anchor(case: EvaluationCase) -> None:
    anchor = case.reader.prompts.text_ids("Answer:")
    for name in ("text", "latent"):
        for prompt in build(case, name).prompts:
            open_prompt = unanswered(prompt)
            assert prompt.ids == open_prompt.ids + answer(prompt)
            assert open_prompt.ids[-len(anchor) :] == anchor
            assert not any(open_prompt.is_target)
            assert open_prompt.latent_at == prompt.latent_at
            assert unanswered(open_prompt) == open_prompt


# --- budgets (B1) -------------------------------------------------------------------------------


@given(text=st.text(st.characters(codec="utf-8"), max_size=30), size=st.integers(-3, 90))
def test_cutting_utf8_never_breaks_a_character(text: str, size: int) -> None:
    cut = cut_utf8(text, size)
    assert text.startswith(cut)
    assert len(cut.encode()) <= max(0, size)
    if cut != text:  # the next character would not have fitted
        assert len(text[: len(cut) + 1].encode()) > size


def test_a_token_budget_is_the_first_m_tokens(case: EvaluationCase) -> None:
    inputs = build(case, "token_budget")
    for prompt, positions, e in zip(inputs.prompts, inputs.positions, case.examples, strict=True):
        text = case.reader.prompts.text_ids(full_text(e.context, e.question))
        assert content(case, prompt) == text[:LATENTS]
        assert positions <= LATENTS
    assert max(inputs.positions) == LATENTS


def test_a_token_budget_can_keep_the_question_and_cut_the_context(
    case: EvaluationCase, mode: Mode
) -> None:
    inputs = build(case, "token_budget_question")
    ids = case.reader.prompts.text_ids
    some_context = False
    for prompt, positions, e in zip(inputs.prompts, inputs.positions, case.examples, strict=True):
        question = ids(question_text(e.question))
        kept = content(case, prompt)
        context = kept[: -len(question)]
        assert kept[-len(question) :] == question
        assert context == ids(context_text(e.context))[: len(context)]
        # A question longer than the whole budget stays whole: cutting it would lose the question.
        budget = max(LATENTS, len(question)) if mode == "pure" else LATENTS
        assert positions <= budget
        # In context mode the label stands beside the latent too: it costs nothing.
        free = len(case.reader.prompts.label_ids)
        room = max(0, LATENTS - len(question)) if mode == "pure" else LATENTS + free
        assert len(context) == min(room, len(ids(context_text(e.context))))
        some_context |= bool(context)
    assert some_context


def test_a_byte_budget_is_at_most_the_payload(
    case: EvaluationCase, mode: Mode, payloads: list[bytes]
) -> None:
    for prompt, payload, e in zip(
        build(case, "byte_budget").prompts, payloads, case.examples, strict=True
    ):
        text = case.reader.tokenizer.decode(content(case, prompt))
        if mode == "context":
            assert text.endswith(question_text(e.question))
            text = text.removesuffix(question_text(e.question)).removeprefix(f"{CONTEXT_LABEL} ")
            whole = e.context
        else:
            whole = full_text(e.context, e.question)
        assert whole.startswith(text)
        # As much as fits: the texts are ASCII, so that is the payload's size or all of it.
        assert len(text.encode()) == min(len(payload), len(whole))


def test_some_texts_exceed_their_byte_budget(case: EvaluationCase, payloads: list[bytes]) -> None:
    assert any(len(e.context) > len(p) for e, p in zip(case.examples, payloads, strict=True))


def test_a_byte_budget_counts_bytes_not_characters(
    model: Interlingua, mode: Mode, readers: dict[str, Reader]
) -> None:
    example = Example("x", "ä" * 50, "Q?", ("a",))
    case = EvaluationCase(model, readers["llama"], [example], {BITS: [bytes(20)]})
    text = case.reader.tokenizer.decode(content(case, build(case, "byte_budget").prompts[0]))
    # In pure mode the label's 9 bytes count: 5 x 2 are left, and one that is half a character.
    kept = "Context: " + "ä" * (5 if mode == "pure" else 10)
    assert text == (kept if mode == "pure" else kept + question_text("Q?"))


@pytest.mark.parametrize("name", ["selective_context", "bm25_sentences"])
def test_shortened_texts_keep_the_question_and_their_positions(
    case: EvaluationCase, mode: Mode, name: str
) -> None:
    inputs = build(case, name)
    ids = case.reader.prompts.text_ids
    for prompt, positions, e in zip(inputs.prompts, inputs.positions, case.examples, strict=True):
        question = ids(question_text(e.question))
        assert content(case, prompt)[-len(question) :] == question
        assert positions <= (max(LATENTS, len(question)) if mode == "pure" else LATENTS)


@pytest.mark.parametrize("name", ["selective_context_bytes", "bm25_sentences_bytes"])
def test_shortened_texts_keep_their_bytes(
    case: EvaluationCase, mode: Mode, payloads: list[bytes], name: str
) -> None:
    for prompt, payload, e in zip(build(case, name).prompts, payloads, case.examples, strict=True):
        text = case.reader.tokenizer.decode(content(case, prompt))
        assert text.endswith(question_text(e.question))
        context = text.removesuffix(question_text(e.question)).removeprefix(f"{CONTEXT_LABEL} ")
        assert len((text if mode == "pure" else context).encode()) <= len(payload)
        left = iter(e.context.split())  # its words are words of the context, in that order
        assert all(word in left for word in context.split())


def test_pruning_keeps_what_the_reader_did_not_expect(case: EvaluationCase) -> None:
    row = max(range(len(case.examples)), key=lambda i: len(case.examples[i].context))
    e = case.examples[row]
    words, information = case.word_information[e.context]
    assert words == e.context.split()
    assert len(information) == len(words)
    prompt = build(case, "selective_context_bytes").prompts[row]
    text = case.reader.tokenizer.decode(content(case, prompt))
    kept = text.removesuffix(question_text(e.question)).removeprefix(f"{CONTEXT_LABEL} ").split()
    best = sorted(information, reverse=True)[: len(kept)]
    chosen = [value for word, value in zip(words, information, strict=True) if word in kept]
    assert min(best) in chosen
    assert len(kept) < len(words)


def test_a_reader_that_has_no_positions_for_a_text_prunes_none(case: EvaluationCase) -> None:
    method = evaluation_methods()["selective_context"]
    assert method.fits(case)
    short = dataclasses.replace(case, examples=[Example("x", "word " * 9000, "Q?", ("a",))])
    assert method.fits(short) is not case.reader.learns_positions


# --- floors and controls ------------------------------------------------------------------------


def test_closed_book_is_the_question_alone(case: EvaluationCase) -> None:
    for prompt, e in zip(build(case, "closed_book").prompts, case.examples, strict=True):
        assert content(case, prompt) == case.reader.prompts.text_ids(question_text(e.question))


def test_the_latent_is_the_examples_payload(case: EvaluationCase, payloads: list[bytes]) -> None:
    assert build(case, "latent").payloads == payloads


def test_the_shuffled_latent_is_another_examples(case: EvaluationCase) -> None:
    inputs, own = build(case, "shuffled_latent"), build(case, "latent")
    assert inputs.prompts == own.prompts
    assert own.payloads is not None
    for i, payload in enumerate(inputs.payloads or []):
        assert own.payloads.count(payload) == 1
        assert own.payloads.index(payload) != i


def test_one_context_has_no_other_latent(case: EvaluationCase) -> None:
    method = evaluation_methods()["shuffled_latent"]
    assert method.not_measured(case) is None
    for same in (case.examples[:1], [case.examples[0]] * 3):
        reason = method.not_measured(dataclasses.replace(case, examples=same))
        assert reason is not None
        assert reason.startswith("all examples have the same context")


def test_questions_on_one_passage_are_not_each_others_control() -> None:
    contexts = ["a", "a", "b", "b", "b", "c", "a"]
    examples = [Example(str(i), context, "Q", ("x",)) for i, context in enumerate(contexts)]
    others = other_contexts(examples)
    assert others == [2, 2, 5, 5, 5, 6, 2]
    assert other_contexts(examples[:2]) == [0, 1]  # nothing else to take


@pytest.mark.parametrize("bits", [16, 8, 6, 4])
def test_the_zero_latent_is_a_payload_of_zeros_at_every_width(
    case: EvaluationCase, bits: int
) -> None:
    rows = range(len(case.examples))
    inputs = evaluation_methods()["zero_latent"].build(case, rows, bits=bits)
    assert inputs.payloads is not None
    assert {wire.read_header(payload).bits for payload in inputs.payloads} == {bits}
    assert not case.model.decode_payloads(inputs.payloads).any()
    assert len(inputs.payloads) == len(rows)


def test_the_first_words_are_the_contexts(case: EvaluationCase) -> None:
    inputs = build(case, "first_words")
    assert inputs.prompts == inputs.positions == []
    for words, e in zip(inputs.answers or [], case.examples, strict=True):
        assert e.context.startswith(words)
        assert len(words.split()) == 5


# --- embedding replay ---------------------------------------------------------------------------


def test_embedding_replay_equals_text(case: EvaluationCase) -> None:
    """The text's own embeddings as a prefix: same predictions and log-probabilities in fp32."""
    text, replay = build(case, "text"), build(case, "embedding_replay")
    reader = case.reader
    assert replay.positions == text.positions
    assert replay.embeddings is not None
    receiver = Receiver.for_text(reader)
    torch.testing.assert_close(
        receiver.score(replay.prompts, embeddings=replay.embeddings).logprobs_NV,
        receiver.score(text.prompts).logprobs_NV,
        atol=2e-5,
        rtol=0,
    )
    open_prompts = [unanswered(p) for p in replay.prompts]
    assert receiver.generate(open_prompts, embeddings=replay.embeddings) == receiver.generate(
        [unanswered(p) for p in text.prompts]
    )
