"""Budgets are kept, controls are controls, and every method asks for the same answer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from latentwire_fast.config.schema import Mode
from latentwire_fast.data.examples import Example
from latentwire_fast.evaluation.methods import (
    MethodInput,
    Methods,
    cut_utf8,
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
from readers import METHODS, tiny_interlingua

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
def methods(
    model: Interlingua, reader: Reader, examples: list[Example], payloads: list[bytes]
) -> Methods:
    return Methods(
        model,
        reader,
        examples,
        payloads=payloads,
    )


def content(methods: Methods, prompt: Prompt) -> list[int]:
    """The ids that stand for user text in a text prompt."""
    start = methods.reader.prompts.content_start
    return prompt.ids[start : start + prompt.content]


def answer(prompt: Prompt) -> list[int]:
    return [token for token, scored in zip(prompt.ids, prompt.is_target, strict=True) if scored]


def build(methods: Methods, name: str) -> MethodInput:
    with torch.no_grad():
        return methods.table[name]()


def standing_in(methods: Methods, given: MethodInput) -> list[Tensor] | list[None]:
    """The soft tokens of each prompt."""
    if given.embeddings is not None:
        return given.embeddings
    if given.payloads is None:
        return [None] * len(given.prompts)
    with torch.no_grad():
        latents = methods.model.decode_payloads(given.payloads)
        return list(methods.model.prefix(methods.reader.name, latents))


# --- every method -------------------------------------------------------------------------------


def test_the_table_holds_every_method_that_reads(methods: Methods) -> None:
    assert set(methods.table) == set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_asks_for_the_same_answer_in_the_same_frame(
    methods: Methods, name: str
) -> None:
    """Template, anchor and gold answer are the text baseline's: only the content differs."""
    given, text = build(methods, name), build(methods, "text")
    start = methods.reader.prompts.content_start
    assert len(given.prompts) == len(given.positions) == len(methods.examples)
    for prompt, whole in zip(given.prompts, text.prompts, strict=True):
        assert answer(prompt) == answer(whole)
        assert prompt.ids[:start] == whole.ids[:start]
        tail = whole.ids[start + whole.content :]
        assert prompt.ids[-len(tail) :] == tail
        assert (prompt.latent_at is None) == (given.payloads is None and given.embeddings is None)


@pytest.mark.parametrize("name", METHODS)
def test_positions_are_those_in_the_latents_place(methods: Methods, mode: Mode, name: str) -> None:
    given = build(methods, name)
    for prompt, positions, prefix, e in zip(
        given.prompts,
        given.positions,
        standing_in(methods, given),
        methods.examples,
        strict=True,
    ):
        question = len(methods.reader.prompts.text_ids(question_text(e.question)))
        taken = prompt.content if prefix is None else len(prefix)
        # In context mode question and label stay text beside the latent, so they do not count,
        # except where they are themselves part of what is cut.
        beside = mode == "context" and name not in (
            "latent",
            "shuffled_latent",
            "zero_latent",
            "token_budget",
        )
        free = question + len(methods.reader.prompts.label_ids)
        assert positions == max(0, taken - (free if beside else 0))


def test_without_its_answer_a_prompt_ends_at_the_anchor(methods: Methods) -> None:
    anchor = methods.reader.prompts.text_ids("Answer:")
    for name in ("text", "latent"):
        for prompt in build(methods, name).prompts:
            open_prompt = unanswered(prompt)
            assert prompt.ids == open_prompt.ids + answer(prompt)
            assert open_prompt.ids[-len(anchor) :] == anchor
            assert not any(open_prompt.is_target)
            assert open_prompt.latent_at == prompt.latent_at
            assert unanswered(open_prompt) == open_prompt


# --- budgets ------------------------------------------------------------------------------------


@given(text=st.text(st.characters(codec="utf-8"), max_size=30), size=st.integers(-3, 90))
def test_cutting_utf8_never_breaks_a_character(text: str, size: int) -> None:
    cut = cut_utf8(text, size)
    assert text.startswith(cut)
    assert len(cut.encode()) <= max(0, size)
    if cut != text:  # the next character would not have fitted
        assert len(text[: len(cut) + 1].encode()) > size


def test_a_token_budget_is_the_first_m_tokens(methods: Methods) -> None:
    given = build(methods, "token_budget")
    for prompt, positions, e in zip(given.prompts, given.positions, methods.examples, strict=True):
        text = methods.reader.prompts.text_ids(full_text(e.context, e.question))
        assert content(methods, prompt) == text[:LATENTS]
        assert positions <= LATENTS
    assert max(given.positions) == LATENTS


def test_a_token_budget_can_keep_the_question_and_cut_the_context(
    methods: Methods, mode: Mode
) -> None:
    given = build(methods, "token_budget_question")
    ids = methods.reader.prompts.text_ids
    some_context = False
    for prompt, positions, e in zip(given.prompts, given.positions, methods.examples, strict=True):
        question = ids(question_text(e.question))
        kept = content(methods, prompt)
        context = kept[: -len(question)]
        assert kept[-len(question) :] == question
        assert context == ids(context_text(e.context))[: len(context)]
        # A question longer than the whole budget stays whole: cutting it would lose the question.
        budget = max(LATENTS, len(question)) if mode == "pure" else LATENTS
        assert positions <= budget
        # In context mode the label stands beside the latent too: it costs nothing.
        free = len(methods.reader.prompts.label_ids)
        room = max(0, LATENTS - len(question)) if mode == "pure" else LATENTS + free
        assert len(context) == min(room, len(ids(context_text(e.context))))
        some_context |= bool(context)
    assert some_context


def test_b1_a_byte_budget_is_at_most_the_payload(
    methods: Methods, mode: Mode, payloads: list[bytes]
) -> None:
    for prompt, payload, e in zip(
        build(methods, "byte_budget").prompts, payloads, methods.examples, strict=True
    ):
        text = methods.reader.tokenizer.decode(content(methods, prompt))
        if mode == "context":
            assert text.endswith(question_text(e.question))
            text = text.removesuffix(question_text(e.question)).removeprefix(f"{CONTEXT_LABEL} ")
            whole = e.context
        else:
            whole = full_text(e.context, e.question)
        assert whole.startswith(text)
        # As much as fits: the texts are ASCII, so that is the payload's size or all of it.
        assert len(text.encode()) == min(len(payload), len(whole))


def test_some_texts_exceed_their_byte_budget(methods: Methods, payloads: list[bytes]) -> None:
    assert any(len(e.context) > len(p) for e, p in zip(methods.examples, payloads, strict=True))


def test_a_byte_budget_counts_bytes_not_characters(
    model: Interlingua, mode: Mode, readers: dict[str, Reader]
) -> None:
    example = Example("x", "ä" * 50, "Q?", ("a",))
    methods = Methods(
        model,
        readers["llama"],
        [example],
        payloads=[bytes(20)],
    )
    text = methods.reader.tokenizer.decode(content(methods, methods.byte_budget().prompts[0]))
    # In pure mode the label's 9 bytes count: 5 x 2 are left, and one that is half a character.
    kept = "Context: " + "ä" * (5 if mode == "pure" else 10)
    assert text == (kept if mode == "pure" else kept + question_text("Q?"))


# --- floors and controls ------------------------------------------------------------------------


def test_closed_book_is_the_question_alone(methods: Methods) -> None:
    for prompt, e in zip(build(methods, "closed_book").prompts, methods.examples, strict=True):
        assert content(methods, prompt) == methods.reader.prompts.text_ids(
            question_text(e.question)
        )


def test_the_latent_is_the_payload(methods: Methods, payloads: list[bytes]) -> None:
    assert build(methods, "latent").payloads == payloads


def test_the_shuffled_latent_is_another_examples(methods: Methods) -> None:
    given, own = build(methods, "shuffled_latent"), build(methods, "latent")
    assert given.payloads is not None
    assert own.payloads is not None
    assert given.prompts == own.prompts
    for i, payload in enumerate(given.payloads):
        source = [j for j, other in enumerate(own.payloads) if other == payload]
        assert len(source) == 1
        assert source != [i]


def test_questions_on_one_passage_are_not_each_others_control() -> None:
    contexts = ["a", "a", "b", "b", "b", "c", "a"]
    examples = [Example(str(i), context, "Q", ("x",)) for i, context in enumerate(contexts)]
    others = other_contexts(examples)
    assert others == [2, 2, 5, 5, 5, 6, 2]
    assert other_contexts(examples[:2]) == [0, 1]  # nothing else to take


def test_the_zero_latent_is_the_same_for_all(methods: Methods) -> None:
    given = build(methods, "zero_latent")
    assert given.payloads is not None
    assert not methods.model.decode_payloads(given.payloads).any()


def test_the_first_words_are_the_contexts(methods: Methods) -> None:
    for words, e in zip(methods.first_words(), methods.examples, strict=True):
        assert e.context.startswith(words)
        assert len(words.split()) == 5


# --- embedding replay ---------------------------------------------------------------------------


def test_embedding_replay_equals_text(methods: Methods) -> None:
    """The text's own embeddings as a prefix: same predictions and log-probabilities in fp32."""
    text, replay = build(methods, "text"), build(methods, "embedding_replay")
    reader = methods.reader
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
