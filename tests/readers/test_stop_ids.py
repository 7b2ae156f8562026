"""F4 and F21: every declared id ends an answer, and what stands for no token is never chosen."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerFast

from latentwire_fast.config.schema import PromptConfig, ReaderConfig
from latentwire_fast.data.examples import Example
from latentwire_fast.errors import ConfigError
from latentwire_fast.evaluation.method_result import MethodResult
from latentwire_fast.evaluation.scoring import add_likelihoods
from latentwire_fast.prompts.builder import Turn
from latentwire_fast.readers.decoding import DecodeOptions, token_ids
from latentwire_fast.readers.output_head import OutputHead
from latentwire_fast.readers.reader import Reader, load_readers
from latentwire_fast.readers.target_scores import TargetScores
from latentwire_fast.serving import Receiver
from readers import tiny_model
from reading import text_prompts

CHAT = (
    "{{ bos_token }}{% for m in messages %}[INST]{{ m['role'] }}\n{{ m['content'] }}<|eot_id|>\n"
    "{% endfor %}{% if add_generation_prompt %}[INST]assistant\n{% endif %}"
)


@pytest.fixture
def chat(llama_tokenizer: PreTrainedTokenizerFast) -> Reader:
    """A reader whose turns end with another token than its tokenizer's EOS."""
    tokenizer = copy.deepcopy(llama_tokenizer)
    tokenizer.add_tokens(["<|eot_id|>"], special_tokens=True)
    tokenizer.chat_template = CHAT
    return Reader(tiny_model("llama", tokenizer), tokenizer, name="llama")


@pytest.mark.parametrize(
    ("declared", "further"),
    [
        (None, []),
        (7, [7]),
        ([7, 9], [7, 9]),
        ([[7], [9, [11]]], [7, 9, 11]),
        ([None, 7, None], [7]),
        ((7, 7), [7]),
        (torch.tensor([7, 9]), [7, 9]),
        ([7, 100_000, -1], [7]),
        ([2], []),  # EOS itself
    ],
)
def test_whatever_a_model_declares_ends_an_answer(
    readers: dict[str, Reader], declared: Any, further: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = readers["llama"]
    monkeypatch.setattr(reader.model, "generation_config", GenerationConfig())
    reader.model.generation_config.eos_token_id = declared
    assert reader.stop_ids == [reader.tokenizer.eos_token_id, *further]
    monkeypatch.setattr(reader.model, "generation_config", None)
    assert reader.stop_ids == [reader.tokenizer.eos_token_id]


def test_ids_out_of_numbers_lists_and_tensors() -> None:
    assert [*token_ids([1, [2, None, (3,)], torch.tensor(4), "5"])] == [1, 2, 3, 4]


def test_the_end_of_a_turn_the_eos_and_what_is_declared_end_an_answer(
    chat: Reader, examples: list[Example]
) -> None:
    eot, eos = chat.tokenizer.convert_tokens_to_ids("<|eot_id|>"), chat.tokenizer.eos_token_id
    assert chat.stop_ids == [eot, eos]
    assert chat.prompts.target_ids("94")[-1] == eot
    prompts = text_prompts(chat, examples[:6], answered=False)
    options = DecodeOptions(max_new_tokens=6)
    answers = Receiver.for_text(chat).generate(prompts, options=options)
    for end in {row[2] for row in answers if len(row) > 2}:
        chat.model.generation_config.eos_token_id = [eos, end]
        assert chat.stop_ids == [eot, eos, end]
        stopped = Receiver.for_text(chat).generate(prompts, options=options)
        assert stopped == [row[: row.index(end)] if end in row else row for row in answers]
        later = DecodeOptions(max_new_tokens=6, eos_ban_steps=6)
        banned = Receiver.for_text(chat).generate(prompts, options=later)
        assert not {eot, eos, end} & {i for row in banned for i in row}


def test_a_padding_token_that_ends_answers_is_no_hindrance(
    chat: Reader, examples: list[Example]
) -> None:
    tokenizer = copy.deepcopy(chat.tokenizer)
    tokenizer.pad_token = "<|eot_id|>"
    padded = Reader(chat.model, tokenizer, name="llama")
    assert padded.pad_id == padded.prompts.eos_id
    prompts = text_prompts(padded, examples, answered=False)
    alone = [Receiver.for_text(padded).generate([prompt])[0] for prompt in prompts]
    assert Receiver.for_text(padded).generate(prompts) == alone


def test_an_answer_is_scored_by_that_it_ends_with_whichever_token(
    chat: Reader, examples: list[Example]
) -> None:
    prompts = text_prompts(chat, examples[:4], answered=True)
    scores = chat.score(prompts)
    eot, eos = chat.stop_ids
    expected = scores.logprobs_NV.gather(1, scores.labels_N[:, None])[:, 0]
    ends = scores.labels_N == eot
    assert int(ends.sum()) == len(prompts)
    both = scores.logprobs_NV[ends][:, [eot, eos]].exp().sum(-1).log()
    expected[ends] = both
    torch.testing.assert_close(scores.gold_N, expected)
    means = [row.mean() for row in scores.by_prompt(expected)]
    torch.testing.assert_close(scores.mean_gold_B, torch.stack(means))  # of joint rescoring


def test_a_first_token_that_ends_the_answer_is_a_hit_whichever_it_is() -> None:
    logprobs_NV = torch.full((2, 8), -9.0)
    logprobs_NV[0, 5], logprobs_NV[1, 3] = -0.1, -0.1  # the other stop token; another token
    labels_N, rows_N = torch.tensor([2, 3]), torch.tensor([0, 1])
    head = OutputHead(torch.eye(8), None, 8)
    scores = TargetScores(
        hidden_ND=logprobs_NV,  # the head leaves them as they are
        head=head,
        labels_N=labels_N,
        rows_N=rows_N,
        step_N=torch.zeros(2).long(),
        prompts=2,
        stop_ids=(2, 5),
    )
    result = MethodResult([], [], [])
    add_likelihoods(result, scores)
    assert result.top1 == [1.0, 1.0]
    assert result.reciprocal_ranks == [1.0, 1.0]


def test_prompts_of_tokens_that_the_model_has_not_are_refused(
    llama_tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer = copy.deepcopy(llama_tokenizer)
    model = tiny_model("llama", tokenizer)
    tokenizer.add_tokens(["<|eot_id|>"], special_tokens=True)
    assert Reader(model, tokenizer, name="llama").stop_ids == [tokenizer.eos_token_id]
    tokenizer.chat_template = CHAT
    with pytest.raises(ConfigError, match=r"its prompts need token '<\|eot_id\|>', number 920"):
        Reader(model, tokenizer, name="llama")


# --- F21: rows of the output embedding that are no token ------------------------------------------


def padded(folder: Path) -> Reader:
    """A reader with 24 rows too many, which score best."""
    reader = Reader.load(folder, name="llama")
    tokens = len(reader.tokenizer)
    reader.model.resize_token_embeddings(tokens + 24)
    with torch.no_grad():
        nn.init.normal_(reader.embedding.weight[tokens:], std=10.0)
    return Reader(reader.model, reader.tokenizer, name="llama")


def test_scores_and_ranks_are_of_tokens_only(llama_folder: Path, examples: list[Example]) -> None:
    reader = padded(llama_folder)
    tokens = len(reader.tokenizer)
    prompts = text_prompts(reader, examples[:4], answered=True)
    scores = reader.score(prompts)
    assert scores.logprobs_NV.shape[1] == tokens
    whole = reader.head(reader.target_hidden(reader.collate(prompts)))
    assert bool((whole.argmax(-1) >= tokens).any()), "a control: such rows do score best"
    torch.testing.assert_close(scores.logprobs_NV, whole[:, :tokens].log_softmax(-1))
    assert int(scores.ranked_NK(10).max()) < tokens


def test_gaps_between_tokens_are_never_chosen(
    readers: dict[str, Reader], examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some tokenizers have numbers without a token, which decode to nothing."""
    reader = Reader(readers["llama"].model, readers["llama"].tokenizer, name="llama")
    prompts = text_prompts(reader, examples[:4], answered=False)
    usual = Receiver.for_text(reader).generate(prompts)
    gaps = {row[0] for row in usual}
    vocabulary = {t: i for t, i in reader.tokenizer.get_vocab().items() if i not in gaps}
    monkeypatch.setattr(type(reader.tokenizer), "get_vocab", lambda _: vocabulary)
    fresh = Reader.__new__(Reader)
    fresh.__dict__ |= {k: v for k, v in reader.__dict__.items() if k not in ("vocabulary", "_gaps")}
    assert fresh.of_tokens(torch.zeros(2, 920)).isinf().sum() == 2 * len(gaps)
    for options in (DecodeOptions(), DecodeOptions(1, first_token_temperature=50.0)):
        got = Receiver.for_text(fresh).generate(prompts, options=options)
        assert not gaps & {i for row in got for i in row}
    scores: Tensor = fresh.score(text_prompts(reader, examples[:4], answered=True)).logprobs_NV
    torch.testing.assert_close(scores.exp().sum(-1), torch.ones(len(scores)))


# --- settings -------------------------------------------------------------------------------------


def test_readers_are_asked_as_configured_and_share_their_weights(llama_folder: Path) -> None:
    source = str(llama_folder)
    found = load_readers(
        {
            "usual": ReaderConfig(source),
            "bare": ReaderConfig(source, anchor="none", bos=False),
            "chat": ReaderConfig(source, anchor="chat", append_bos_after_prefix=True),
            "words": ReaderConfig(source, anchor_text="So:", date="2020-01-01"),
        }
    )
    assert len({id(reader.model) for reader in found.values()}) == 1
    turns = [Turn("Q", "a")]
    texts = {
        name: r.tokenizer.decode(r.prompts.build(turns, context=None, latent="context").ids)
        for name, r in found.items()
    }
    assert texts == {
        "usual": "<s>[INST]Context:\nQuestion: Q[/INST]Answer: a</s>",
        "bare": "[INST]Context:\nQuestion: Q a</s>",
        "chat": "<s>[INST]Context:<s>\nQuestion: Q[/INST]a</s>",
        "words": "<s>[INST]Context:\nQuestion: Q[/INST]So: a</s>",
    }
    assert found["words"].prompts.config == ReaderConfig(
        source, anchor_text="So:", date="2020-01-01"
    )
    assert ReaderConfig(source, anchor="none", dtype="bfloat16").weights == ReaderConfig(
        source, dtype="bfloat16"
    )
    assert isinstance(ReaderConfig(source), PromptConfig)
