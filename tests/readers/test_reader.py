"""Readers: padding does not matter (D2), targets see what they may, decoding is plain greedy."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from latentwire_fast.config.schema import ReaderConfig
from latentwire_fast.data.examples import Example
from latentwire_fast.errors import ConfigError
from latentwire_fast.prompts.batch import PaddingSide
from latentwire_fast.prompts.builder import Prompt, Turn, full_text
from latentwire_fast.readers.decoding import DecodeOptions
from latentwire_fast.readers.loading import resolve_source
from latentwire_fast.readers.reader import Reader, load_readers
from readers import tiny_model

NEW_TOKENS = 6
SIDES: list[PaddingSide] = ["left", "right"]


def text_prompts(reader: Reader, examples: list[Example], *, answered: bool) -> list[Prompt]:
    return [
        reader.prompts.build(
            [Turn(e.question, e.answers[0] if answered else None)], context=e.context
        )
        for e in examples
    ]


def latent_prompts(reader: Reader, examples: list[Example], *, answered: bool) -> list[Prompt]:
    return [
        reader.prompts.build(
            [Turn(e.question, e.answers[0] if answered else None)],
            context=e.context,
            latent="context",
        )
        for e in examples
    ]


def random_prefixes(reader: Reader, count: int) -> list[Tensor]:
    """Prefixes of 1 to 7 positions at the scale of the reader's embeddings."""
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randn(1 + i % 7, reader.d_model, generator=generator) * reader.embedding_rms
        for i in range(count)
    ]


def inputs(
    reader: Reader, examples: list[Example], kind: str, *, answered: bool
) -> tuple[list[Prompt], list[Tensor] | None]:
    """Prompts and prefixes of one kind: `text` or `prefix`."""
    if kind == "text":
        return text_prompts(reader, examples, answered=answered), None
    prompts = latent_prompts(reader, examples, answered=answered)
    return prompts, random_prefixes(reader, len(examples))


def row_embeds(reader: Reader, prompt: Prompt, prefix: Tensor | None) -> Tensor:
    """One unpadded row of input embeddings, `[1, T, D]`."""
    embeds = reader.embedding(torch.tensor(prompt.ids))
    if prefix is not None:
        at = prompt.latent_at
        embeds = torch.cat([embeds[:at], prefix, embeds[at:]])
    return embeds[None]


@torch.no_grad()
def decode_slowly(
    reader: Reader,
    prompt: Prompt,
    prefix: Tensor | None,
    *,
    steps: int = NEW_TOKENS,
    eos: int | None = None,
    ban: int = 0,
) -> list[int]:
    """Greedy decoding without a cache, a batch or padding, from the model's own logits."""
    embeds = row_embeds(reader, prompt, prefix)
    eos = reader.prompts.eos_id if eos is None else eos
    ids: list[int] = []
    for step in range(steps):
        logits = reader.model(inputs_embeds=embeds, use_cache=False).logits[0, -1]
        if step < ban:
            logits[eos] = -torch.inf
        token = int(logits.argmax())
        if token == eos:
            break
        ids.append(token)
        embeds = torch.cat([embeds, reader.embedding(torch.tensor([[token]]))], 1)
    return ids


# --- D2: batch size and padding -----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["text", "prefix"])
def test_d2_predictions_are_those_of_single_rows_at_any_batch_size_and_padding(
    reader: Reader, examples: list[Example], kind: str
) -> None:
    prompts, prefixes = inputs(reader, examples, kind, answered=False)
    each = prefixes or [None] * len(prompts)
    expected = [decode_slowly(reader, p, m) for p, m in zip(prompts, each, strict=True)]
    options = DecodeOptions(max_new_tokens=NEW_TOKENS)
    for side in SIDES:
        for size in (1, 5, 16):
            got: list[list[int]] = []
            for start in range(0, len(prompts), size):
                rows = slice(start, start + size)
                part = None if prefixes is None else prefixes[rows]
                got += reader.generate(prompts[rows], prefixes=part, options=options, side=side)
            assert got == expected, f"{kind}, {side}-padded, batches of {size}"
    assert len({tuple(row) for row in expected}) > len(expected) // 2  # the prompts do matter


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", ["text", "prefix"])
def test_d2_log_probabilities_of_a_padded_batch_are_those_of_single_rows(
    reader: Reader, examples: list[Example], kind: str, side: PaddingSide
) -> None:
    prompts, prefixes = inputs(reader, examples, kind, answered=True)
    together = reader.target_logprobs(reader.collate(prompts, prefixes=prefixes, side=side))
    each = prefixes or [None] * len(prompts)
    alone = []
    for prompt, prefix in zip(prompts, each, strict=True):
        logits = reader.model(inputs_embeds=row_embeds(reader, prompt, prefix)).logits[0]
        answer = sum(prompt.is_target)
        alone.append(logits[-answer - 1 : -1].log_softmax(-1))
    torch.testing.assert_close(together, torch.cat(alone), atol=2e-5, rtol=0)


def test_an_answer_token_is_predicted_from_those_before_it_only(
    reader: Reader, examples: list[Example]
) -> None:
    """Changing gold token t moves the predictions after t, not those up to t."""
    question = [Turn(examples[0].question, "red lamp 94")]
    prompt = reader.prompts.build(question, context=examples[0].context)
    base = reader.target_logprobs(reader.collate([prompt]))
    first = prompt.is_target.index(True)
    count = len(prompt.ids) - first
    assert count >= 4
    for t in range(count - 1):
        changed = Prompt([*prompt.ids], None, prompt.is_target)
        changed.ids[first + t] += 1
        moved = (reader.target_logprobs(reader.collate([changed])) - base).abs().amax(-1)
        assert (moved[: t + 1] == 0).all()
        assert (moved[t + 1 :] > 1e-4).all()


def test_target_logprobs_are_normalised_fp32(reader: Reader, examples: list[Example]) -> None:
    logprobs = reader.target_logprobs(
        reader.collate(text_prompts(reader, examples[:2], answered=True))
    )
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs.exp().sum(-1), torch.ones(len(logprobs)))


def test_first_logits_are_what_the_first_answer_token_is_scored_with(
    reader: Reader, examples: list[Example]
) -> None:
    for kind in ("text", "prefix"):
        answered, prefixes = inputs(reader, examples[:5], kind, answered=True)
        batch = reader.collate(answered, prefixes=prefixes)
        scored = reader.target_logprobs(batch)[batch.step_N == 0]
        unanswered, _ = inputs(reader, examples[:5], kind, answered=False)
        for i in range(5):
            part = None if prefixes is None else prefixes[i : i + 1]
            first = reader.first_logits(unanswered[i : i + 1], prefixes=part).log_softmax(-1)
            torch.testing.assert_close(first[0], scored[i], atol=2e-5, rtol=0)
        together = reader.first_logits(unanswered, prefixes=prefixes).log_softmax(-1)
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
    assert reader.generate(prompts, options=DecodeOptions(max_new_tokens=NEW_TOKENS)) == expected


def test_generate_returns_new_tokens_only(reader: Reader, examples: list[Example]) -> None:
    """S-era code sliced by the prompt length and lost the answer."""
    prompt = text_prompts(reader, examples[:1], answered=False)
    for count in (1, 3):
        (ids,) = reader.generate(prompt, options=DecodeOptions(max_new_tokens=count))
        assert ids == decode_slowly(reader, prompt[0], None, steps=count)
        assert len(ids) == count


@pytest.fixture
def stopping(
    llama_folder: Path, examples: list[Example]
) -> tuple[Reader, list[Prompt], list[list[int]], int]:
    """A reader whose EOS is the third token of its first answer, with prompts and full answers."""
    reader = Reader.load(llama_folder, name="llama")
    prompts = text_prompts(reader, examples, answered=False)
    answers = reader.generate(prompts, options=DecodeOptions(max_new_tokens=NEW_TOKENS))
    eos = answers[0][2]
    assert eos not in answers[0][:2]
    reader.prompts.eos_id = eos
    return reader, prompts, answers, eos


def test_generation_stops_at_eos_row_by_row(
    stopping: tuple[Reader, list[Prompt], list[list[int]], int],
) -> None:
    reader, prompts, answers, eos = stopping
    stopped = reader.generate(prompts, options=DecodeOptions(max_new_tokens=NEW_TOKENS))
    assert stopped[0] == answers[0][:2]
    assert stopped == [row[: row.index(eos)] if eos in row else row for row in answers]
    assert max(map(len, stopped)) == NEW_TOKENS  # others went on


@pytest.mark.parametrize("ban", [1, 3, NEW_TOKENS])
def test_eos_can_be_banned_for_the_first_steps(
    stopping: tuple[Reader, list[Prompt], list[list[int]], int], ban: int
) -> None:
    reader, prompts, _, eos = stopping
    options = DecodeOptions(max_new_tokens=NEW_TOKENS, eos_ban_steps=ban)
    got = reader.generate(prompts[:4], options=options)
    assert got == [decode_slowly(reader, p, None, eos=eos, ban=ban) for p in prompts[:4]]
    assert len(got[0]) == 2 if ban < 3 else len(got[0]) >= ban


def test_the_first_token_is_sampled_by_seed_and_the_rest_is_greedy(
    reader: Reader, examples: list[Example]
) -> None:
    prompts = text_prompts(reader, examples, answered=False)

    def draw(seed: int) -> list[list[int]]:
        options = DecodeOptions(max_new_tokens=3, first_token_temperature=1.5, seed=seed)
        return reader.generate(prompts, options=options)

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
    probs = (reader.first_logits(prompt)[0] / temperature).softmax(-1)
    options = DecodeOptions(max_new_tokens=1, first_token_temperature=temperature)
    drawn = reader.generate(prompt * rows, options=options)
    counts = torch.zeros_like(probs)
    for ids in drawn:
        counts[ids[0] if ids else reader.prompts.eos_id] += 1
    deviation = (counts / rows - probs).abs()
    assert (deviation <= 5 * (probs * (1 - probs) / rows).sqrt() + 1 / rows).all()


def test_first_tokens_come_from_the_nucleus(reader: Reader, examples: list[Example]) -> None:
    prompt = text_prompts(reader, examples[:1], answered=False)
    probs, order = (reader.first_logits(prompt)[0] / 2.0).softmax(-1).sort(descending=True)
    top_p = float(probs[:3].sum()) - 1e-4  # the smallest set that reaches it holds three tokens
    options = DecodeOptions(max_new_tokens=1, first_token_temperature=2.0, first_token_top_p=top_p)
    drawn = reader.generate(prompt * 300, options=options)
    assert {ids[0] for ids in drawn} == set(order[:3].tolist())


def test_a_narrow_nucleus_and_no_temperature_are_greedy(
    reader: Reader, examples: list[Example]
) -> None:
    prompts = text_prompts(reader, examples, answered=False)
    greedy = reader.generate(prompts, options=DecodeOptions(max_new_tokens=2))
    narrow = DecodeOptions(max_new_tokens=2, first_token_temperature=1.0, first_token_top_p=1e-6)
    assert reader.generate(prompts, options=narrow) == greedy


def test_what_is_sampled_does_not_depend_on_the_batches(
    reader: Reader, examples: list[Example]
) -> None:
    prompts = text_prompts(reader, examples, answered=False)
    options = DecodeOptions(max_new_tokens=2, first_token_temperature=2.0)
    together = reader.generate(prompts, options=options)
    numbers = range(len(prompts))
    for size in (1, 5):
        batches = [numbers[i : i + size] for i in range(0, len(prompts), size)]
        cut = [
            reader.generate([prompts[i] for i in rows], options=options, numbers=rows)
            for rows in batches
        ]
        assert [ids for batch in cut for ids in batch] == together
    same = reader.generate(prompts[:1] * 8, options=options)
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


def test_decoded_text_has_no_control_tokens_and_no_outer_space(reader: Reader) -> None:
    ids = [*reader.prompts.text_ids(" red lamp"), *reader.tokenizer.all_special_ids]
    assert reader.decode(ids) == "red lamp"


# --- frozen, yet transparent to gradients -------------------------------------------------------


def test_n3_gradients_flow_to_the_prefix_and_not_to_the_reader(
    reader: Reader, examples: list[Example]
) -> None:
    before = reader.weights_digest()
    prompts = latent_prompts(reader, examples[:4], answered=True)
    prefixes = [p.requires_grad_() for p in random_prefixes(reader, 4)]
    batch = reader.collate(prompts, prefixes=prefixes)
    logprobs = reader.target_logprobs(batch)
    (-logprobs.gather(1, batch.labels_N[:, None]).sum()).backward()
    for prefix in prefixes:
        assert prefix.grad is not None
        assert (prefix.grad.abs().amax(-1) > 0).all()  # every position was read
    assert all(p.grad is None and not p.requires_grad for p in reader.model.parameters())
    assert not reader.model.training
    assert reader.weights_digest() == before == reader.fingerprint


def test_a_rows_loss_does_not_reach_another_rows_prefix(
    reader: Reader, examples: list[Example]
) -> None:
    prefixes = [p.requires_grad_() for p in random_prefixes(reader, 4)]
    for side in SIDES:
        batch = reader.collate(
            latent_prompts(reader, examples[:4], answered=True), prefixes=prefixes, side=side
        )
        loss = reader.target_logprobs(batch)[batch.rows_N == 2].square().sum()
        gradients = torch.autograd.grad(loss, prefixes)
        assert [bool(g.any()) for g in gradients] == [False, False, True, False]


def test_gradient_checkpointing_changes_no_gradient(
    llama_folder: Path, examples: list[Example]
) -> None:
    gradients = []
    for checkpointing in (False, True):
        reader = Reader.load(llama_folder, name="llama")
        if checkpointing:
            reader.enable_gradient_checkpointing()
        assert not reader.model.training
        prefix = random_prefixes(reader, 2)[1].requires_grad_()
        prompts = latent_prompts(reader, examples[:1], answered=True)
        hidden = reader.target_hidden(reader.collate(prompts, prefixes=[prefix]))
        hidden.square().sum().backward()
        gradients.append(prefix.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


# --- loading ------------------------------------------------------------------------------------


def small(vocab_size: int) -> dict[str, int | float]:
    return {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.5,
    }


def gemma2(vocab_size: int) -> PreTrainedModel:
    config = Gemma2Config(**small(vocab_size), head_dim=8, final_logit_softcapping=5.0)
    return Gemma2ForCausalLM(config)


def granite(vocab_size: int) -> PreTrainedModel:
    return GraniteForCausalLM(GraniteConfig(**small(vocab_size), logits_scaling=8.0))


def cohere(vocab_size: int) -> PreTrainedModel:
    return CohereForCausalLM(CohereConfig(**small(vocab_size), logit_scale=0.0625))


def weakly_capped(vocab_size: int) -> PreTrainedModel:
    """The logits of one prompt do not show it."""
    config = Gemma2Config(**small(vocab_size), head_dim=8, final_logit_softcapping=1e6)
    return Gemma2ForCausalLM(config)


@pytest.mark.parametrize("build", [gemma2, granite, cohere, weakly_capped])
def test_a_model_that_transforms_its_logits_is_refused(
    llama_tokenizer: PreTrainedTokenizerFast, build: Callable[[int], PreTrainedModel]
) -> None:
    with pytest.raises(ConfigError, match="transforms its logits"):
        Reader(build(len(llama_tokenizer)), llama_tokenizer, name="capped")


def test_a_capped_model_without_its_cap_is_accepted(
    llama_tokenizer: PreTrainedTokenizerFast,
) -> None:
    config = Gemma2Config(**small(len(llama_tokenizer)), head_dim=8, final_logit_softcapping=None)
    assert Reader(Gemma2ForCausalLM(config), llama_tokenizer, name="gemma").d_model == 32


def test_readers_load_from_folders_as_configured(llama_folder: Path, qwen_folder: Path) -> None:
    readers = load_readers(
        {
            "a": ReaderConfig(str(llama_folder)),
            "b": ReaderConfig(str(qwen_folder), dtype="bfloat16", attn_implementation="eager"),
        }
    )
    assert {name: reader.name for name, reader in readers.items()} == {"a": "a", "b": "b"}
    assert readers["a"].embedding.weight.dtype == torch.float32
    assert readers["b"].embedding.weight.dtype == torch.bfloat16
    assert readers["b"].model.config._attn_implementation == "eager"
    assert (readers["a"].d_model, readers["b"].d_model) == (32, 48)
    assert readers["a"].source == str(llama_folder)


def test_a_loaded_tokenizer_is_the_one_that_was_saved(
    request: pytest.FixtureRequest, readers: dict[str, Reader], examples: list[Example]
) -> None:
    """`AutoTokenizer` would give it the pre-tokenizer of the model's family."""
    for name, reader in readers.items():
        saved = request.getfixturevalue(f"{name}_tokenizer")
        for e in examples:
            text = full_text(e.context, e.question)
            assert (
                reader.prompts.text_ids(text) == saved(text, add_special_tokens=False)["input_ids"]
            )
            assert reader.tokenizer.decode(reader.prompts.text_ids(text)) == text


def test_the_fingerprint_tells_weights_apart(
    llama_folder: Path, llama_tokenizer: PreTrainedTokenizerFast, readers: dict[str, Reader]
) -> None:
    assert Reader.load(llama_folder, name="again").fingerprint == readers["llama"].fingerprint
    other = Reader(tiny_model("llama", llama_tokenizer, seed=1), llama_tokenizer, name="llama")
    assert other.fingerprint != readers["llama"].fingerprint


def test_the_embedding_rms_is_that_of_the_table(reader: Reader) -> None:
    expected = reader.embedding.weight.double().square().mean().sqrt().item()
    assert reader.embedding_rms == pytest.approx(expected, rel=1e-5)


def test_a_tokenizer_without_pad_pads_with_eos(llama_tokenizer: PreTrainedTokenizerFast) -> None:
    unpadded = copy.deepcopy(llama_tokenizer)
    unpadded.pad_token = None
    reader = Reader(tiny_model("llama", llama_tokenizer), unpadded, name="llama")
    assert reader.pad_id == reader.prompts.eos_id


def test_an_unknown_shipped_reader_is_named_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'testbed:gpt'.*testbed:llama.*testbed:qwen"):
        resolve_source("testbed:gpt")


def test_four_bit_readers_need_bitsandbytes(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match="load_in_4bit needs"):
        Reader.load(llama_folder, name="llama", load_in_4bit=True)
