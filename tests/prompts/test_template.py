"""Chat templates: cut into their pieces, the same on every day, or refused in one line."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from latentwire_fast.config.schema import PromptConfig
from latentwire_fast.data.testbed import make_examples
from latentwire_fast.errors import ConfigError
from latentwire_fast.prompts.builder import ANCHOR, PromptBuilder, Turn, full_text, question_text

CHATML = (
    "{% for m in messages %}<|user|>{{ m['role'] }}\n{{ m['content'] CHANGE}}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONTEXT, QUESTION = "Nulnak is already 94 years old.", "How old is Nulnak?"


def templated(tokenizer: PreTrainedTokenizerFast, template: Any) -> PreTrainedTokenizerFast:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def prompt_text(tokenizer: PreTrainedTokenizerFast, config: PromptConfig | None = None) -> str:
    builder = PromptBuilder(tokenizer, config)
    prompt = builder.build([Turn("Q1", "A1"), Turn("Q2")], context="C")
    return str(tokenizer.decode(prompt.ids))


def targets(builder: PromptBuilder, answer: str = "94") -> list[int]:
    prompt = builder.build([Turn(QUESTION, answer)], context=CONTEXT)
    return [i for i, is_target in zip(prompt.ids, prompt.is_target, strict=True) if is_target]


# --- F5: dates ------------------------------------------------------------------------------------

DATED = {
    "Llama 3.1": (
        "{% if not date_string is defined %}{% if strftime_now is defined %}"
        "{% set date_string = strftime_now('%d %b %Y') %}{% else %}"
        "{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}"
        "{{ bos_token }}Today Date: {{ date_string }}\n"
    ),
    "SmolLM3": "{{ bos_token }}Today Date: {{ strftime_now('%d %B %Y') }}\n",
    "time": "{{ bos_token }}{{ strftime_now('%Y-%m-%d %H:%M:%S') }}\n",
}
DATED["line breaks"] = "\n  " + DATED["SmolLM3"].replace("}}\n", "}}\n\n  {% set x = 1 %}\n")
TURNS = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST]{{ m['content'] }}[/INST]"
    "{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("kind", DATED)
def test_a_template_that_names_the_date_gives_the_same_on_every_day(
    llama_tokenizer: PreTrainedTokenizerFast, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = templated(llama_tokenizer, DATED[kind] + TURNS)
    today = PromptBuilder(tokenizer).build([Turn(QUESTION, "94")], context=CONTEXT)

    class Clock(chat_template_utils.datetime):
        day = (2031, 1, 2, 3, 4, 5)

        @classmethod
        def now(cls, tz: Any = None) -> Clock:
            return cls(*cls.day)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)

    def opening() -> str:
        chat_template_utils._compile_jinja_template.cache_clear()
        messages = [{"role": "user", "content": "x"}]
        return str(tokenizer.apply_chat_template(messages, tokenize=False)).partition("x[/INST]")[0]

    assert "2031" in opening(), "a control: without a fixed date it is another prompt"
    later = PromptBuilder(tokenizer).build([Turn(QUESTION, "94")], context=CONTEXT)
    assert later == today
    Clock.day = (2024, 7, 26, 0, 0, 0)
    assert tokenizer.decode(later.ids).startswith(opening()), "nothing else of it is changed"


def test_the_date_is_a_setting(llama_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = templated(llama_tokenizer, DATED["Llama 3.1"] + TURNS)
    assert "Today Date: 26 Jul 2024\n" in prompt_text(tokenizer)
    assert "Today Date: 03 May 2023\n" in prompt_text(tokenizer, PromptConfig(date="2023-05-03"))
    for wrong in ("today", "2024-13-01", "20240726", "26.07.2024", ""):
        with pytest.raises(ConfigError, match=f"date={re.escape(repr(wrong))}, expected a date"):
            PromptConfig(date=wrong)


# --- F4: the token that ends a turn -------------------------------------------------------------


@pytest.mark.parametrize("end", ["<|eot_id|>", "<|im_end|>", "<end_of_turn>"])
@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("before", ["", " ", "\n"])
def test_an_answer_ends_as_the_templates_turn_does(
    llama_tokenizer: PreTrainedTokenizerFast, end: str, special: bool, before: str
) -> None:
    """Not with the tokenizer's EOS, which is another token in many chat models."""
    tokenizer = copy.deepcopy(llama_tokenizer)
    tokenizer.add_tokens([end], special_tokens=special)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[INST]{{ m['role'] }}\n{{ m['content'] }}"
        + before
        + end
        + "\n{% endfor %}{% if add_generation_prompt %}[INST]assistant\n{% endif %}"
    )
    builder = PromptBuilder(tokenizer)
    end_id = tokenizer.convert_tokens_to_ids(end)
    assert builder.eos_id == end_id != tokenizer.eos_token_id
    assert targets(builder) == [*builder.answer_ids("94"), end_id]
    assert prompt_text(tokenizer).count("A1" + end + "\n[INST]user\n\nQuestion: Q2") == 1


@pytest.mark.parametrize(
    ("template", "between"),
    [
        (TURNS, "</s>[INST]"),
        (TURNS.replace("{{ eos_token }}", " {{ eos_token }}{{ bos_token }}"), "</s><s>[INST]"),
        (TURNS.replace("{{ eos_token }}", "\n"), "</s>\n[INST]"),  # it has no token for the end
    ],
)
def test_without_a_token_of_its_own_a_turn_ends_with_eos_once(
    llama_tokenizer: PreTrainedTokenizerFast, template: str, between: str
) -> None:
    tokenizer = templated(llama_tokenizer, template)
    assert PromptBuilder(tokenizer).eos_id == tokenizer.eos_token_id
    assert f"A1{between}\nQuestion: Q2" in prompt_text(tokenizer)


# --- system, trimming, thinking -------------------------------------------------------------------


def test_a_template_that_needs_a_system_message_gets_one(
    llama_tokenizer: PreTrainedTokenizerFast,
) -> None:
    strict = (
        "{% if messages[0]['role'] != 'system' %}{{ raise_exception('system first') }}{% endif %}"
        "{{ messages[0]['content'] }}\n{% for m in messages[1:] %}"
    )
    tokenizer = templated(llama_tokenizer, strict + TURNS.partition("%}")[2])
    text = prompt_text(tokenizer)
    assert text.startswith("You are a helpful assistant.\n[INST]Context: C\nQuestion: Q1[/INST]")


def test_a_template_that_insists_on_the_user_as_last_speaker(
    llama_tokenizer: PreTrainedTokenizerFast,
) -> None:
    last = "{% if messages[-1]['role'] != 'user' %}{{ raise_exception('user') }}{% endif %}"
    tokenizer = templated(llama_tokenizer, last + TURNS)
    assert prompt_text(tokenizer) == prompt_text(templated(llama_tokenizer, TURNS))


def test_white_space_that_a_template_trims_is_not_in_the_prompt(
    qwen_tokenizer: PreTrainedTokenizerFast,
) -> None:
    for change in ("", "| trim "):
        tokenizer = templated(qwen_tokenizer, CHATML.replace("CHANGE", change))
        builder = PromptBuilder(tokenizer)
        for context in (CONTEXT, None):
            turns = [Turn(QUESTION, "94"), Turn("Who?")]
            first = full_text(CONTEXT, QUESTION) if context else question_text(QUESTION)
            messages = [
                {"role": "user", "content": first},
                {"role": "assistant", "content": "94"},
                {"role": "user", "content": question_text("Who?")},
            ]
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            text = text.replace("\n94<", f"\n{ANCHOR} 94<") + ANCHOR
            prompt = builder.build(turns, context=context)
            assert tokenizer.decode(prompt.ids) == text.replace(
                "<|user|>assistant\n", "<|assistant|>"
            )
        latent = builder.build([Turn(QUESTION)], context=None, latent="context")
        assert "Context:\nQuestion:" in tokenizer.decode(latent.ids), "it is not at the start"


THINKING = {
    "switched off": (
        "{% if enable_thinking is defined and enable_thinking is false %}"
        "<think>\n\n</think>\n\n{% endif %}"
    ),
    "another switch": "{% if thinking is defined and not thinking %}</think>\n\n{% endif %}",
    "always opened": "<think>\n",
}


@pytest.mark.parametrize("kind", THINKING)
def test_an_answer_comes_behind_the_thinking(
    qwen_tokenizer: PreTrainedTokenizerFast, kind: str
) -> None:
    template = CHATML.replace("CHANGE", "").replace(
        "<|assistant|>{%", f"<|assistant|>{THINKING[kind]}{{%"
    )
    tokenizer = copy.deepcopy(qwen_tokenizer)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = template
    wanted = "</think>\n\n" if kind == "another switch" else "<think>\n\n</think>\n\n"
    assert f"<|assistant|>{wanted}{ANCHOR} A1<|end|>" in prompt_text(tokenizer)


def test_a_template_without_a_generation_prompt_has_the_answers_header(
    qwen_tokenizer: PreTrainedTokenizerFast,
) -> None:
    template = CHATML.replace("CHANGE", "").partition("{% if add")[0]
    text = prompt_text(templated(qwen_tokenizer, template))
    assert f"Q1<|end|>\n<|user|>assistant\n{ANCHOR} A1<|end|>\n<|user|>user\n" in text


# --- F31: templates that cannot be used -----------------------------------------------------------

FAILING = [
    ("{{ raise_exception('no user') }}", "fails: no user"),
    ("{{ messages + 1 }}", "fails: can only concatenate list"),
    ("{{ messages | no_such_filter }}", "fails: No filter named 'no_such_filter'"),
    ("{{ messages[0]['content'] / 0 }}", "fails: unsupported operand"),
    ("{{ 1 / 0 }}", "fails: division by zero"),
    ("{% for m in messages", "fails: "),
    ("{{ nothing.at.all }}", "fails: 'nothing' is undefined"),
    ("{% for i in range(10 ** 9) %}{% endfor %}", "fails: Range too big"),
    (TURNS + "{{ range(99999) | random }}", "gives another text each time"),
    ("{{ messages | map(attribute='content') | join(' ') }}{{ messages[0].content }}", "rewrites"),
    ("{{ messages[-1]['content'] }}", "rewrites its messages"),
    ("{{ messages[0]['content'] }}{{ messages[1]['content'] }}", "rewrites its messages"),
    ({"rag": TURNS, "tool_use": TURNS}, r"several chat templates and no default.*\['rag', 'tool"),
]


@pytest.mark.parametrize(("template", "message"), FAILING)
def test_a_template_that_cannot_be_used_is_one_line(
    llama_tokenizer: PreTrainedTokenizerFast, template: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        PromptBuilder(templated(llama_tokenizer, template))
    assert "\n" not in str(caught.value)


def test_one_of_several_templates_is_named(llama_tokenizer: PreTrainedTokenizerFast) -> None:
    several = templated(
        llama_tokenizer, {"default": TURNS, "rag": TURNS.replace("[INST]{{", "[INST]rag {{")}
    )
    assert "[INST]Context" in prompt_text(several)
    assert "[INST]rag Context" in prompt_text(several, PromptConfig(template="rag"))
    with pytest.raises(ConfigError, match=r"no chat template of that name.*\['default', 'rag'\]"):
        PromptBuilder(several, PromptConfig(template="tool_use"))
    for tokenizer in (llama_tokenizer, templated(llama_tokenizer, None)):
        with pytest.raises(ConfigError, match=r"has no named templates.*leave `template` out"):
            PromptBuilder(tokenizer, PromptConfig(template="rag"))


# --- anchors and BOS ------------------------------------------------------------------------------


def test_the_anchor_is_text_the_chats_own_header_or_nothing(
    qwen_tokenizer: PreTrainedTokenizerFast,
) -> None:
    expected = {
        "text": "Q1<|end|><|assistant|>Answer: A1<|end|><|user|>",
        "chat": "Q1<|end|><|assistant|>A1<|end|><|user|>",
        "none": "Q1 A1<|end|><|user|>",
    }
    for anchor, text in expected.items():
        config = PromptConfig(anchor=anchor)  # type: ignore[arg-type]
        assert text in prompt_text(qwen_tokenizer, config)
        builder = PromptBuilder(qwen_tokenizer, config)
        answers = [e.answers[0] for e in make_examples(20, seed=3, facts=2)]
        assert builder.check_alignment(answers) == []
        assert builder.build_rebuild("a b") == PromptBuilder(qwen_tokenizer).build_rebuild("a b")
    other = prompt_text(qwen_tokenizer, PromptConfig(anchor_text="In short:"))
    assert "<|assistant|>In short: A1<|end|>" in other
    plain = templated(qwen_tokenizer, None)
    assert prompt_text(plain) == "Context: C\nQuestion: Q1\nAnswer: A1<|end|>" + (
        "\nQuestion: Q2\nAnswer:"
    )
    assert "Q1 A1<|end|>\nQuestion: Q2" in prompt_text(plain, PromptConfig(anchor="none"))
    with pytest.raises(ConfigError, match=r"anchor='chat'.*no chat template"):
        PromptBuilder(plain, PromptConfig(anchor="chat"))
    with pytest.raises(ConfigError, match="anchor_text is empty"):
        PromptConfig(anchor_text="")


@pytest.mark.parametrize("latent", ["context", "pure"])
def test_bos_can_stand_behind_the_latent(
    llama_tokenizer: PreTrainedTokenizerFast,
    qwen_tokenizer: PreTrainedTokenizerFast,
    latent: Any,
) -> None:
    config = PromptConfig(append_bos_after_prefix=True)
    turns = [Turn(QUESTION, "94"), Turn("Who?")]
    with_bos, without = PromptBuilder(llama_tokenizer, config), PromptBuilder(llama_tokenizer)
    prompt = with_bos.build(turns, context=None, latent=latent)
    usual = without.build(turns, context=None, latent=latent)
    at = usual.latent_at
    assert prompt.latent_at == at is not None
    assert prompt.ids == [*usual.ids[:at], llama_tokenizer.bos_token_id, *usual.ids[at:]]
    assert prompt.content == usual.content
    assert prompt.is_target == [*usual.is_target[:at], False, *usual.is_target[at:]]
    rebuilt = with_bos.build_rebuild("a b")
    assert rebuilt.ids[rebuilt.latent_at] == llama_tokenizer.bos_token_id
    assert with_bos.build(turns, context="C") == without.build(turns, context="C")
    assert with_bos.build_many(turns[:1], latent=latent)[0] == with_bos.build(
        turns[:1], context=None, latent=latent
    )
    with pytest.raises(ConfigError, match=r"append_bos_after_prefix.*no BOS"):
        PromptBuilder(qwen_tokenizer, config)
