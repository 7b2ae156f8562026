"""The receiver's input: its pieces are what the whole text tokenises to, and nothing leaks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from tokenizers import Tokenizer, models, trainers
from transformers import PreTrainedTokenizerFast

from latentwire_fast.config.schema import PromptConfig
from latentwire_fast.data.examples import Example
from latentwire_fast.data.testbed import COLOURS, JOBS, OBJECTS, SYLLABLES
from latentwire_fast.errors import ConfigError
from latentwire_fast.prompts.builder import (
    ANCHOR,
    Mode,
    Prompt,
    PromptBuilder,
    Turn,
    context_text,
    full_text,
    question_text,
)

CONTEXT, QUESTION = "Nulnak is already 94 years old.", "How old is Nulnak?"


@pytest.fixture(scope="session", params=["llama_tokenizer", "qwen_tokenizer"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def builder(tokenizer: PreTrainedTokenizerFast) -> PromptBuilder:
    return PromptBuilder(tokenizer)


def without_template(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    return plain


def whole(
    tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], tail: str
) -> list[int]:
    """A conversation rendered by the chat template, `tail` behind it, tokenised in one go."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text + tail, add_special_tokens=False)["input_ids"]


def targets(prompt: Prompt) -> list[int]:
    return [
        token for token, is_target in zip(prompt.ids, prompt.is_target, strict=True) if is_target
    ]


# --- alignment ----------------------------------------------------------------------------------


@pytest.mark.parametrize("anchor", ["Answer: ", "Answer:\n", "Answer:\t", " "])
def test_an_anchor_that_ends_in_white_space_is_refused(
    llama_tokenizer: PreTrainedTokenizerFast, anchor: str
) -> None:
    with pytest.raises(ConfigError, match="ends in white space"):
        PromptBuilder(llama_tokenizer, PromptConfig(anchor_text=anchor))


def test_every_testbed_answer_tokenises_after_the_anchor_as_it_does_alone(
    builder: PromptBuilder,
) -> None:
    names = [(first + second).capitalize() for first in SYLLABLES for second in SYLLABLES]
    things = [f"{colour} {thing}" for colour in COLOURS for thing in OBJECTS]
    answers = [*names, *things, *JOBS, *map(str, range(10, 100))]
    assert builder.check_alignment(answers) == []


def test_a_trailing_space_would_break_every_name(builder: PromptBuilder) -> None:
    """An anchor with a space at its end, as a control: what the refusal prevents."""
    names = [(first + SYLLABLES[0]).capitalize() for first in SYLLABLES]
    split = builder.text_ids(f"{ANCHOR} ")
    broken = [
        name
        for name in names
        if split + builder.text_ids(name) != builder.text_ids(f"{ANCHOR} {name}")
    ]
    assert broken == names


def test_the_alignment_check_finds_answers_that_merge_with_the_anchor() -> None:
    tokenizer = Tokenizer(models.BPE())  # no pre-tokenizer: merges run across words
    tokenizer.train_from_iterator(
        ["Answer: yes"] * 20,
        trainers.BpeTrainer(
            vocab_size=60,
            special_tokens=["</s>"],
            initial_alphabet=list("Answer: yeno"),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    builder = PromptBuilder(fast)
    assert len(builder.text_ids("Answer: yes")) == 1
    assert builder.check_alignment(["yes"]) == ["yes"]


def test_the_alignment_check_takes_control_tokens_in_an_answer_as_text(
    builder: PromptBuilder, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert (
        builder.check_alignment([f"red {token} lamp" for token in tokenizer.all_special_tokens])
        == []
    )


def test_a_prompt_is_what_the_rendered_template_tokenises_to(
    builder: PromptBuilder, tokenizer: PreTrainedTokenizerFast, examples: list[Example]
) -> None:
    for e in examples:
        prompt = builder.build([Turn(e.question, e.answers[0])], context=e.context)
        user = [{"role": "user", "content": full_text(e.context, e.question)}]
        tail = f"{ANCHOR} {e.answers[0]}{tokenizer.eos_token}"
        assert prompt.ids == whole(tokenizer, user, tail)


def test_context_and_question_tokenise_together_as_they_do_apart(
    builder: PromptBuilder, examples: list[Example]
) -> None:
    for e in examples:
        parts = builder.text_ids(context_text(e.context)) + builder.text_ids(
            question_text(e.question)
        )
        assert builder.text_ids(full_text(e.context, e.question)) == parts


# --- text prompts -------------------------------------------------------------------------------


def test_several_turns_are_packed_as_one_conversation(
    builder: PromptBuilder, tokenizer: PreTrainedTokenizerFast
) -> None:
    turns = [Turn(QUESTION, "94"), Turn("Who is old?", "Nulnak"), Turn("Who supervises Nulnak?")]
    prompt = builder.build(turns, context=CONTEXT)
    messages = [
        {"role": "user", "content": full_text(CONTEXT, QUESTION)},
        {"role": "assistant", "content": f"{ANCHOR} 94"},
        {"role": "user", "content": question_text("Who is old?")},
        {"role": "assistant", "content": f"{ANCHOR} Nulnak"},
        {"role": "user", "content": question_text("Who supervises Nulnak?")},
    ]
    assert prompt.ids == whole(tokenizer, messages, ANCHOR)
    assert prompt.latent_at is None


def test_targets_are_the_answers_and_their_eos_and_nothing_else(
    builder: PromptBuilder, tokenizer: PreTrainedTokenizerFast
) -> None:
    turns = [Turn(QUESTION, "94"), Turn("What does Nulnak own?", "red lamp"), Turn("Who?")]
    prompt = builder.build(turns, context=CONTEXT)
    eos = [tokenizer.eos_token_id]
    assert targets(prompt) == (builder.text_ids(" 94") + eos + builder.text_ids(" red lamp") + eos)
    assert len(prompt.is_target) == len(prompt.ids)
    anchor = builder.text_ids(ANCHOR)
    assert prompt.ids[-len(anchor) :] == anchor
    first = prompt.is_target.index(True)
    assert prompt.ids[first - len(anchor) : first] == anchor


def test_a_closed_book_prompt_holds_no_context(
    builder: PromptBuilder, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompt = builder.build([Turn(QUESTION)], context=None)
    assert prompt.ids == whole(
        tokenizer, [{"role": "user", "content": question_text(QUESTION)}], ANCHOR
    )
    assert "Context" not in tokenizer.decode(prompt.ids)


def test_user_ids_take_the_place_of_the_user_text(builder: PromptBuilder) -> None:
    full = builder.build([Turn(QUESTION, "94")], context=CONTEXT)
    start = builder.content_start
    content = full.ids[start : start + full.content]
    assert content == builder.text_ids(full_text(CONTEXT, QUESTION))
    cut = builder.build([Turn(QUESTION, "94")], context=CONTEXT, user_ids=content[:3])
    assert cut.ids == full.ids[: start + 3] + full.ids[start + full.content :]
    assert cut.content == 3
    assert targets(cut) == targets(full)


def test_control_tokens_spelled_in_user_text_stay_text(
    builder: PromptBuilder, tokenizer: PreTrainedTokenizerFast
) -> None:
    control = set(tokenizer.all_special_ids)

    def controls(prompt: Prompt) -> list[int]:
        return [token for token in prompt.ids if token in control]

    spelled = " ".join(tokenizer.all_special_tokens)
    for latent in (None, "context", "pure"):
        harmless = builder.build([Turn("who", "it")], context="a b", latent=latent)
        hostile = builder.build([Turn(spelled, spelled)], context=spelled, latent=latent)
        assert controls(hostile) == controls(harmless)
    assert tokenizer.decode(builder.text_ids(spelled)) == spelled
    assert controls(builder.build_context(spelled)) == controls(builder.build_context("a b"))
    assert controls(builder.build_rebuild(spelled)) == controls(builder.build_rebuild("a b"))


# --- latent prompts -----------------------------------------------------------------------------


def test_context_mode_puts_the_latent_in_the_contexts_place(builder: PromptBuilder) -> None:
    text = builder.build([Turn(QUESTION, "94")], context=CONTEXT)
    latent = builder.build([Turn(QUESTION, "94")], context=CONTEXT, latent="context")
    start, label = builder.content_start, builder.text_ids("Context:")
    assert latent.latent_at is not None
    assert latent.ids[: latent.latent_at] == text.ids[:start] + label
    context = len(builder.text_ids(context_text(CONTEXT)))
    assert latent.ids[latent.latent_at :] == text.ids[start + context :]
    assert latent.content == len(builder.text_ids(question_text(QUESTION)))
    assert targets(latent) == targets(text)


def test_pure_mode_puts_the_latent_in_the_whole_user_texts_place(builder: PromptBuilder) -> None:
    text = builder.build([Turn(QUESTION, "94")], context=CONTEXT)
    latent = builder.build([Turn(QUESTION, "94")], context=CONTEXT, latent="pure")
    start = builder.content_start
    assert latent.latent_at == start
    assert latent.ids == text.ids[:start] + text.ids[start + text.content :]
    assert latent.content == 0


@pytest.mark.parametrize("mode", ["context", "pure"])
def test_a_latent_prompt_is_the_same_whatever_the_context(
    builder: PromptBuilder, mode: str
) -> None:
    """The student sees the latent and the text its mode keeps, nothing else."""
    one = builder.build([Turn(QUESTION, "94")], context=CONTEXT, latent=mode)
    other = builder.build([Turn(QUESTION, "94")], context="Something else.", latent=mode)
    assert one == other


def test_what_no_prompt_can_be_built_of_is_refused(builder: PromptBuilder) -> None:
    wrong: Any = "soft"
    with pytest.raises(ConfigError, match="latent='soft', expected one of"):
        builder.build([Turn("Who?")], context=None, latent=wrong)
    with pytest.raises(ConfigError, match="latent='soft', expected one of"):
        builder.build_many([Turn("Who?")], latent=wrong)
    with pytest.raises(ConfigError, match="no turns"):
        builder.build([], context="Nobody.")


def test_later_turns_are_text_in_both_modes(builder: PromptBuilder) -> None:
    turns = [Turn(QUESTION, "94"), Turn("Who is old?", "Nulnak")]
    tail = builder.build(turns, context=CONTEXT)
    for mode in ("context", "pure"):
        prompt = builder.build(turns, context=CONTEXT, latent=mode)
        assert targets(prompt) == targets(tail)
        second = len(builder.build(turns[:1], context=CONTEXT, latent=mode).ids)
        first = len(builder.build(turns[:1], context=CONTEXT).ids)
        assert prompt.ids[second:] == tail.ids[first:]


def test_a_rebuild_prompt_asks_for_the_text_itself(
    builder: PromptBuilder, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompt = builder.build_rebuild(CONTEXT)
    assert targets(prompt) == [*builder.text_ids(f" {CONTEXT}"), tokenizer.eos_token_id]
    assert prompt.latent_at == prompt.is_target.index(True)
    # What stands before the latent is what stands before it when a question follows.
    question = builder.build([Turn(QUESTION)], context=CONTEXT, latent="context")
    assert prompt.ids[: prompt.latent_at] == question.ids[: question.latent_at]
    # The latent and the target together are laid out as the context itself is.
    assert prompt.ids[:-1] == builder.build_context(CONTEXT).ids


def test_an_encoders_context_can_be_cut(builder: PromptBuilder) -> None:
    full, cut = builder.build_context(CONTEXT), builder.build_context(CONTEXT, max_tokens=4)
    assert cut.ids == full.ids[: builder.content_start + 4]
    assert cut.content == 4


# --- tokenizers ---------------------------------------------------------------------------------


def test_bos_comes_once_and_can_be_left_out(llama_tokenizer: PreTrainedTokenizerFast) -> None:
    bos = llama_tokenizer.bos_token_id
    opening = {
        option: PromptBuilder(llama_tokenizer, PromptConfig(bos=option))
        .build([Turn("Q")], context=None)
        .ids
        for option in (None, True, False)
    }
    assert opening[None].count(bos) == 1  # the template's own
    assert opening[True] == opening[None]
    assert opening[False] == opening[None][1:]


def test_without_a_template_bos_comes_first_unless_refused(
    llama_tokenizer: PreTrainedTokenizerFast,
) -> None:
    plain = without_template(llama_tokenizer)
    prompt = PromptBuilder(plain).build([Turn("Q", "a")], context="C")
    assert prompt.ids[0] == plain.bos_token_id
    assert plain.decode(prompt.ids[1:]) == f"Context: C\nQuestion: Q\n{ANCHOR} a</s>"
    bare = PromptBuilder(plain, PromptConfig(bos=False)).build([Turn("Q", "a")], context="C")
    assert bare.ids == prompt.ids[1:]


def test_a_tokenizer_without_bos_is_left_without(qwen_tokenizer: PreTrainedTokenizerFast) -> None:
    plain = without_template(qwen_tokenizer)
    for option in (None, True, False):
        prompt = PromptBuilder(plain, PromptConfig(bos=option)).build([Turn("Q")], context="C")
        assert plain.decode(prompt.ids) == f"Context: C\nQuestion: Q\n{ANCHOR}"


def test_a_tokenizer_without_eos_is_refused(llama_tokenizer: PreTrainedTokenizerFast) -> None:
    endless = copy.deepcopy(llama_tokenizer)
    endless.eos_token = None
    with pytest.raises(ConfigError, match="no EOS token"):
        PromptBuilder(endless)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m['content'] | lower }}{% endfor %}",
        "{{ messages[0]['content'] }}{{ messages[0]['content'] }}",
        "{{ messages[0]['content'] }}",
    ],
)
def test_a_template_that_rewrites_messages_is_refused(
    llama_tokenizer: PreTrainedTokenizerFast, template: str
) -> None:
    rewriting = copy.deepcopy(llama_tokenizer)
    rewriting.chat_template = template
    with pytest.raises(ConfigError, match="rewrites its messages"):
        PromptBuilder(rewriting)


@pytest.mark.parametrize("template", ["{{ raise_exception('no system') }}", "{% for m in messages"])
def test_a_template_that_fails_is_refused(
    llama_tokenizer: PreTrainedTokenizerFast, template: str
) -> None:
    failing = copy.deepcopy(llama_tokenizer)
    failing.chat_template = template
    with pytest.raises(ConfigError, match=r"the chat template of .* fails: "):
        PromptBuilder(failing)


@pytest.mark.parametrize("latent", [None, "context", "pure"])
@pytest.mark.parametrize("answer", [None, "94"])
@pytest.mark.parametrize("with_contexts", [True, False])
def test_prompts_built_together_are_the_prompts_built_one_by_one(
    tokenizer: PreTrainedTokenizerFast,
    latent: Mode | None,
    answer: str | None,
    with_contexts: bool,
) -> None:
    builder = PromptBuilder(tokenizer)
    questions = [QUESTION, "", "Who?", "What is   the job of Selpon,\nif any?"]
    contexts = [CONTEXT, "", "<s> is no control token </s>", " a "] if with_contexts else None
    turns = [Turn(question, answer) for question in questions]
    together = builder.build_many(turns, contexts=contexts, latent=latent)
    assert together == [
        builder.build([turn], context=context, latent=latent)
        for turn, context in zip(turns, contexts or [None] * 4, strict=True)
    ]
    assert all((prompt.latent_at is None) == (latent is None) for prompt in together)
    assert builder.build_many([], latent=latent) == []
