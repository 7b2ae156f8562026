"""Decoding: what a row gets alone it gets in any batch; greedy but for the options."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from latentwire_fast.data.examples import Example
from latentwire_fast.errors import ConfigError
from latentwire_fast.prompts.builder import Prompt, Turn
from latentwire_fast.readers.decoding import DecodeOptions
from latentwire_fast.readers.reader import Reader
from latentwire_fast.serving import Receiver
from reading import decode_slowly, inputs, text_prompts

NEW_TOKENS = 6
AT_MOST = DecodeOptions(max_new_tokens=NEW_TOKENS)


def first_logits(
    reader: Reader, prompts: Sequence[Prompt], prefixes: list[Tensor] | None = None
) -> Tensor:
    return Receiver.for_text(reader).prefill(prompts, embeddings=prefixes).logits_BV


# --- D2: batch size and padding ------------------------------------------------------------------


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("kind", ["text", "prefix"])
def test_predictions_are_those_of_single_rows_at_any_batch_size(
    reader: Reader, examples: list[Example], kind: str
) -> None:
    prompts, prefixes = inputs(reader, examples, kind, answered=False)
    each = prefixes or [None] * len(prompts)
    expected = [
        decode_slowly(reader, p, m, steps=NEW_TOKENS) for p, m in zip(prompts, each, strict=True)
    ]
    receiver = Receiver.for_text(reader)
    for size in (1, 5, 16):
        got: list[list[int]] = []
        for start in range(0, len(prompts), size):
            rows = slice(start, start + size)
            part = None if prefixes is None else prefixes[rows]
            got += receiver.generate(prompts[rows], embeddings=part, options=AT_MOST)
        assert got == expected, f"{kind}, batches of {size}"
    assert len({tuple(row) for row in expected}) > len(expected) // 2  # the prompts do matter


def test_first_logits_are_what_the_first_answer_token_is_scored_with(
    reader: Reader, examples: list[Example]
) -> None:
    receiver = Receiver.for_text(reader)
    for kind in ("text", "prefix"):
        answered, prefixes = inputs(reader, examples[:5], kind, answered=True)
        scores = receiver.score(answered, embeddings=prefixes)
        scored = scores.logprobs_NV[scores.step_N == 0]
        unanswered, _ = inputs(reader, examples[:5], kind, answered=False)
        for i in range(5):
            part = None if prefixes is None else prefixes[i : i + 1]
            first = first_logits(reader, unanswered[i : i + 1], part).log_softmax(-1)
            torch.testing.assert_close(first[0], scored[i], atol=2e-5, rtol=0)
        together = first_logits(reader, unanswered, prefixes).log_softmax(-1)
        torch.testing.assert_close(together, scored, atol=2e-5, rtol=0)


# --- decoding -----------------------------------------------------------------------------------


def test_generate_equals_transformers_own_greedy_decoding(
    reader: Reader, examples: list[Example]
) -> None:
    prompts = text_prompts(reader, examples, answered=False)
    batch = reader.collate(prompts, side="left")
    theirs = reader.model.generate(
        input_ids=batch.ids_BT,
        attention_mask=batch.mask_BT.long(),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
    )[:, batch.ids_BT.shape[1] :]
    eos = reader.prompts.eos_id
    expected = [row[: row.index(eos)] if eos in row else row for row in theirs.tolist()]
    assert Receiver.for_text(reader).generate(prompts, options=AT_MOST) == expected


def test_generate_returns_new_tokens_only(reader: Reader, examples: list[Example]) -> None:
    """S-era code sliced by the prompt length and lost the answer."""
    prompt = text_prompts(reader, examples[:1], answered=False)
    for count in (1, 3):
        (ids,) = Receiver.for_text(reader).generate(
            prompt, options=DecodeOptions(max_new_tokens=count)
        )
        assert ids == decode_slowly(reader, prompt[0], None, steps=count)
        assert len(ids) == count


@pytest.fixture
def stopping(
    llama_folder: Path, examples: list[Example]
) -> tuple[Reader, list[Prompt], list[list[int]], int]:
    """A reader whose EOS is the third token of its first answer, with prompts and full answers."""
    reader = Reader.load(llama_folder, name="llama")
    prompts = text_prompts(reader, examples, answered=False)
    answers = Receiver.for_text(reader).generate(prompts, options=AT_MOST)
    eos = answers[0][2]
    assert eos not in answers[0][:2]
    reader.prompts.eos_id = eos
    return reader, prompts, answers, eos


def test_generation_stops_at_eos_row_by_row(
    stopping: tuple[Reader, list[Prompt], list[list[int]], int],
) -> None:
    reader, prompts, answers, eos = stopping
    stopped = Receiver.for_text(reader).generate(prompts, options=AT_MOST)
    assert stopped[0] == answers[0][:2]
    assert stopped == [row[: row.index(eos)] if eos in row else row for row in answers]
    assert max(map(len, stopped)) == NEW_TOKENS  # others went on


@pytest.mark.parametrize("ban", [1, 3, NEW_TOKENS])
def test_eos_can_be_banned_for_the_first_steps(
    stopping: tuple[Reader, list[Prompt], list[list[int]], int], ban: int
) -> None:
    reader, prompts, _, eos = stopping
    assert eos in reader.stop_ids
    options = DecodeOptions(max_new_tokens=NEW_TOKENS, eos_ban_steps=ban)
    got = Receiver.for_text(reader).generate(prompts[:4], options=options)
    assert got == [
        decode_slowly(reader, p, None, steps=NEW_TOKENS, stops=reader.stop_ids, ban=ban)
        for p in prompts[:4]
    ]
    assert len(got[0]) == 2 if ban < 3 else len(got[0]) >= ban


def test_the_first_token_is_sampled_by_seed_and_the_rest_is_greedy(
    reader: Reader, examples: list[Example]
) -> None:
    prompts = text_prompts(reader, examples, answered=False)

    def draw(seed: int) -> list[list[int]]:
        options = DecodeOptions(max_new_tokens=3, first_token_temperature=1.5, seed=seed)
        return Receiver.for_text(reader).generate(prompts, options=options)

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    for prompt, ids in zip(prompts, draw(1), strict=True):
        assert ids
        continued = Prompt([*prompt.ids, ids[0]])
        assert ids[1:] == decode_slowly(reader, continued, None, steps=2)[: len(ids) - 1]


def test_first_tokens_follow_the_tempered_distribution(
    reader: Reader, examples: list[Example]
) -> None:
    prompt, rows, temperature = text_prompts(reader, examples[:1], answered=False), 3000, 0.7
    probs = (first_logits(reader, prompt)[0] / temperature).softmax(-1)
    options = DecodeOptions(max_new_tokens=1, first_token_temperature=temperature)
    drawn = Receiver.for_text(reader).generate(prompt * rows, options=options)
    counts = torch.zeros_like(probs)
    for ids in drawn:
        counts[ids[0] if ids else reader.prompts.eos_id] += 1
    deviation = (counts / rows - probs).abs()
    assert (deviation <= 5 * (probs * (1 - probs) / rows).sqrt() + 1 / rows).all()


def test_first_tokens_come_from_the_nucleus(reader: Reader, examples: list[Example]) -> None:
    prompt = text_prompts(reader, examples[:1], answered=False)
    probs, order = (first_logits(reader, prompt)[0] / 2.0).softmax(-1).sort(descending=True)
    top_p = float(probs[:3].sum()) - 1e-4  # the smallest set that reaches it holds three tokens
    options = DecodeOptions(max_new_tokens=1, first_token_temperature=2.0, first_token_top_p=top_p)
    drawn = Receiver.for_text(reader).generate(prompt * 300, options=options)
    assert {ids[0] for ids in drawn} == set(order[:3].tolist())


def test_a_narrow_nucleus_and_no_temperature_are_greedy(
    reader: Reader, examples: list[Example]
) -> None:
    prompts = text_prompts(reader, examples, answered=False)
    greedy = Receiver.for_text(reader).generate(prompts, options=DecodeOptions(max_new_tokens=2))
    narrow = DecodeOptions(max_new_tokens=2, first_token_temperature=1.0, first_token_top_p=1e-6)
    assert Receiver.for_text(reader).generate(prompts, options=narrow) == greedy


def test_what_is_sampled_does_not_depend_on_the_batches(
    reader: Reader, examples: list[Example]
) -> None:
    prompts = text_prompts(reader, examples, answered=False)
    options = DecodeOptions(max_new_tokens=2, first_token_temperature=2.0)
    receiver = Receiver.for_text(reader)
    together = receiver.generate(prompts, options=options)
    numbers = range(len(prompts))
    for size in (1, 5):
        batches = [numbers[i : i + size] for i in range(0, len(prompts), size)]
        cut = [
            Receiver.for_text(reader).generate(
                [prompts[i] for i in rows], options=options, numbers=rows
            )
            for rows in batches
        ]
        assert [ids for batch in cut for ids in batch] == together
    same = Receiver.for_text(reader).generate(prompts[:1] * 8, options=options)
    assert len({tuple(ids) for ids in same}) > 1, "every example has noise of its own"


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0},
        {"first_token_top_p": 0.0},
        {"first_token_top_p": 1.1},
        {"first_token_temperature": -0.5},
    ],
)
def test_impossible_decode_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        DecodeOptions(**options)


def test_every_declared_stop_token_ends_an_answer(
    llama_folder: Path, examples: list[Example]
) -> None:
    """Chat models end a turn with another token than their tokenizer's EOS."""
    reader = Reader.load(llama_folder, name="llama")
    prompts = text_prompts(reader, examples, answered=False)
    answers = Receiver.for_text(reader).generate(prompts, options=AT_MOST)
    further = answers[0][2]
    eos = reader.prompts.eos_id
    reader.model.generation_config.eos_token_id = [eos, further]
    assert reader.stop_ids == [eos, further]
    stopped = Receiver.for_text(reader).generate(prompts, options=AT_MOST)
    assert stopped == [row[: row.index(further)] if further in row else row for row in answers]
    theirs = reader.model.generate(
        input_ids=torch.tensor([prompts[0].ids]), max_new_tokens=NEW_TOKENS, do_sample=False
    )[0, len(prompts[0].ids) :].tolist()
    assert theirs == [*stopped[0], further]


def test_rows_of_the_output_embedding_without_a_token_are_never_picked(
    llama_folder: Path, examples: list[Example]
) -> None:
    """Vocabularies are padded: such rows may score best of all."""
    reader = Reader.load(llama_folder, name="llama")
    prompts = text_prompts(reader, examples[:4], answered=False)
    expected = Receiver.for_text(reader).generate(prompts, options=AT_MOST)
    tokens = len(reader.tokenizer)
    reader.model.resize_token_embeddings(tokens + 24)
    padded = Reader(reader.model, reader.tokenizer, name="llama")
    with torch.no_grad():
        rows = padded.embedding.weight[tokens:]
        nn.init.normal_(rows, std=10.0)
    assert padded.vocabulary == tokens < padded.head_weight.shape[0]
    receiver = Receiver.for_text(padded)
    assert (receiver.prefill(prompts).logits_BV.argmax(-1) >= tokens).any()
    assert receiver.generate(prompts, options=AT_MOST) == expected
    sampled = DecodeOptions(1, first_token_temperature=50.0, eos_ban_steps=1)
    drawn = receiver.generate(prompts[:1] * 200, options=sampled)
    assert max(ids[0] for ids in drawn) < tokens


# --- the end of a table of positions (F19) ------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neo", "mpt", "opt"])
def test_each_row_ends_where_its_own_positions_do(
    readers: dict[str, Reader], kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A short prompt beside a long one gets the answer that it gets alone, also from models that
    count columns (GPT-Neo, MPT)."""
    tokenizer = readers["llama"].tokenizer
    options = {
        "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64},
        "gpt_neo": {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 2,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 8,
            "max_position_embeddings": 64,
        },
        "mpt": {"d_model": 32, "n_layers": 1, "n_heads": 2, "max_seq_len": 64},
        "opt": {
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "ffn_dim": 32,
            "word_embed_proj_dim": 32,
            "max_position_embeddings": 64,
        },
    }[kind]
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **options)
    model = AutoModelForCausalLM.from_config(config)
    reader = Reader(model, tokenizer, name="gpt")
    prompts = [
        Prompt([20 + (7 * i + size) % 400 for i in range(size)], None, [False] * size)
        for size in (62, 20)
    ]
    receiver = Receiver.for_text(reader)
    ten = DecodeOptions(max_new_tokens=10, eos_ban_steps=10)
    alone = [receiver.generate([prompt], options=ten)[0] for prompt in prompts]
    assert [len(ids) for ids in alone] == [3, 10]
    assert "an answer was cut: reader 'gpt' has a table of 64 positions" in caplog.text
    first = receiver.prefill(prompts)
    assert first.generate(ten) == alone
    assert first.generate(ten) == alone, "decoding again starts from the prompts"


def test_logits_that_are_no_numbers_are_no_answer(readers: dict[str, Reader]) -> None:
    """F26: the likeliest token of NaN would be the first one."""
    reader = readers["llama"]
    prompt = reader.prompts.build([Turn("Who?")], context=None, latent="context")
    nothing = [torch.full((2, reader.d_model), torch.inf)]
    with pytest.raises(ConfigError, match=r"computes NaN from this prompt: .* smaller prefix gain"):
        Receiver.for_text(reader).generate([prompt], embeddings=nothing)
