"""Readers: padding does not matter (D2), targets see what they may, weights stay frozen."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
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
from latentwire_fast.readers import loading
from latentwire_fast.readers.loading import resolve_source
from latentwire_fast.readers.logits import LogitTransform
from latentwire_fast.readers.reader import Reader, load_readers
from readers import tiny_model
from reading import inputs, latent_prompts, random_prefixes, row_embeds, text_prompts

SIDES: list[PaddingSide] = ["left", "right"]


# --- D2: batch size and padding -----------------------------------------------------------------


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", ["text", "prefix"])
def test_log_probabilities_of_a_padded_batch_are_those_of_single_rows(
    reader: Reader, examples: list[Example], kind: str, side: PaddingSide
) -> None:
    prompts, prefixes = inputs(reader, examples, kind, answered=True)
    together = reader.score(prompts, prefixes=prefixes, side=side).logprobs_NV
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
    base = reader.score([prompt]).logprobs_NV
    first = prompt.is_target.index(True)
    count = len(prompt.ids) - first
    assert count >= 4
    for t in range(count - 1):
        changed = Prompt([*prompt.ids], None, prompt.is_target)
        changed.ids[first + t] += 1
        moved = (reader.score([changed]).logprobs_NV - base).abs().amax(-1)
        assert (moved[: t + 1] == 0).all()
        assert (moved[t + 1 :] > 1e-4).all()


def test_target_logprobs_are_normalised_fp32(reader: Reader, examples: list[Example]) -> None:
    logprobs = reader.score(text_prompts(reader, examples[:2], answered=True)).logprobs_NV
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs.exp().sum(-1), torch.ones(len(logprobs)))


def test_decoded_text_has_no_control_tokens_and_no_outer_space(reader: Reader) -> None:
    ids = [*reader.prompts.text_ids(" red lamp"), *reader.tokenizer.all_special_ids]
    assert reader.decode(ids) == "red lamp"


def test_scores_are_those_of_each_prompts_answer(reader: Reader, examples: list[Example]) -> None:
    answers = ["94", "red lamp", "a baker in Bakrim"]
    prompts = [
        reader.prompts.build([Turn(e.question, answer)], context=e.context)
        for e, answer in zip(examples, answers, strict=False)
    ]
    scores = reader.score(prompts)
    targets = [reader.prompts.target_ids(answer) for answer in answers]
    assert [row.tolist() for row in scores.by_prompt(scores.labels_N)] == targets
    assert scores.step_N.tolist() == [step for ids in targets for step in range(len(ids))]
    means = [row.mean() for row in scores.by_prompt(scores.gold_N)]
    torch.testing.assert_close(scores.mean_gold_B, torch.stack(means))
    best = scores.logprobs_NV.argsort(-1, descending=True)[:, :10]
    assert torch.equal(scores.ranked_NK(10), best)
    without = reader.score([reader.prompts.build([Turn("Who?")], context=None), *prompts])
    assert [len(row) for row in without.by_prompt(without.gold_N)] == [0, *map(len, targets)]


# --- frozen, yet transparent to gradients (N3) --------------------------------------------------


def test_gradients_flow_to_the_prefix_and_not_to_the_reader(
    reader: Reader, examples: list[Example]
) -> None:
    before = reader.weights_digest()
    prompts = latent_prompts(reader, examples[:4], answered=True)
    prefixes = [p.requires_grad_() for p in random_prefixes(reader, 4)]
    (-reader.score(prompts, prefixes=prefixes).gold_N.sum()).backward()
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
        prompts = latent_prompts(reader, examples[:4], answered=True)
        scores = reader.score(prompts, prefixes=prefixes, side=side)
        loss = scores.logprobs_NV[scores.rows_N == 2].square().sum()
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


@pytest.mark.parametrize(
    ("build", "scale", "softcap"),
    [(gemma2, 1, 5.0), (granite, 0.125, 0), (cohere, 0.0625, 0), (weakly_capped, 1, 1e6)],
)
def test_logits_are_scaled_and_capped_as_the_model_does_it(
    llama_tokenizer: PreTrainedTokenizerFast,
    build: Callable[[int], PreTrainedModel],
    scale: float,
    softcap: float,
) -> None:
    reader = Reader(build(len(llama_tokenizer)), llama_tokenizer, name="capped")
    assert reader.logit_transform == LogitTransform(scale, softcap)
    prompt = reader.prompts.build([Turn("Who?", "a baker")], context="Nulnak is a baker.")
    batch = reader.collate([prompt])
    expected = reader.model(input_ids=batch.ids_BT).logits
    found = reader.logits(reader.target_hidden(batch))
    torch.testing.assert_close(found, expected[batch.rows_N, batch.cols_N], rtol=1e-5, atol=1e-6)
    scored = reader.score([prompt]).logprobs_NV
    torch.testing.assert_close(scored, found.log_softmax(-1))


@pytest.mark.parametrize("change", [lambda x: x.square(), lambda x: 3 * x, lambda x: x + 1])
def test_a_model_that_changes_its_logits_in_another_way_is_refused(
    llama_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    model = tiny_model("llama", llama_tokenizer)
    plain = model.forward

    def forward(**inputs: Any) -> Any:
        output = plain(**inputs)
        output.logits = change(output.logits)
        return output

    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises(ConfigError, match=r"reader 'odd' \(llama\) does something to its logits"):
        Reader(model, llama_tokenizer, name="odd")


def test_a_factor_that_a_model_does_not_use_is_left_out(
    llama_tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = tiny_model("llama", llama_tokenizer)
    model.config.logit_scale = 0.5
    assert Reader(model, llama_tokenizer, name="llama").logit_transform == LogitTransform()


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


def test_a_dtype_that_no_reader_has_is_refused(llama_folder: Path) -> None:
    with pytest.raises(ConfigError, match="dtype='float8', expected 'float32' or"):
        Reader.from_config("llama", ReaderConfig(str(llama_folder)), dtype="float8")


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
    with pytest.raises(ConfigError, match=r"load_in_4bit needs .*run `pip install bitsandbytes`"):
        Reader.load(llama_folder, name="llama", load_in_4bit=True)


def test_flash_attention_that_is_not_installed_is_said_before_weights_are_loaded(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "find_spec", lambda _: None)
    monkeypatch.setattr("latentwire_fast.readers.reader.load_weights", lambda *_, **__: 1 / 0)
    wanted = "needs the package flash-attn and a GPU; run `pip install --no-build-isolation flash-"
    with pytest.raises(ConfigError, match=wanted):
        Reader.load(llama_folder, name="llama", attn_implementation="flash_attention_2")
