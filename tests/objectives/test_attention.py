"""Attention matching: its targets against a plain softmax, and what a perfect prefix scores."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from latentwire_fast.errors import ConfigError
from latentwire_fast.objectives.attention_matching import attention_errors
from latentwire_fast.objectives.teacher_cache import TeacherCache
from latentwire_fast.prompts.builder import Turn
from latentwire_fast.readers.attention_targets import AttentionQuestion, attention_targets
from latentwire_fast.readers.own_kv import head_keys_values, text_keys_values
from latentwire_fast.readers.reader import Reader

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
WINDOWED = ["sliding_attention", "full_attention"] * 2
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "attn_logit_softcapping": 3.0, "final_logit_softcapping": None},
    "gemma3_text": {"head_dim": 16, "layer_types": WINDOWED, "sliding_window": 128},
    "smollm3": {"no_rope_layers": [1, 1, 1, 0]},
    "gpt_neox": {},
}


def family_reader(kind: str, reader: Reader) -> Reader:
    """A tiny random reader of one family, with another reader's tokenizer."""
    torch.manual_seed(0)
    size = len(reader.tokenizer)
    special = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": reader.prompts.eos_id}
    options = {**SMALL, "vocab_size": size, **special, **FAMILIES.get(kind, {})}
    config = AutoConfig.for_model(kind, **options)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return Reader(model, reader.tokenizer, name=kind)


def a_question(reader: Reader, *, slots: int, again: int = 12) -> AttentionQuestion:
    turns = [Turn("Where does Nulnak live?", "Paris")]
    prompt = reader.prompts.build_again(
        turns, context="Nulnak lives in Paris.", tokens=again, rng=random.Random(0)
    )
    start = reader.prompts.content_start + len(reader.prompts.label_ids)
    stop = start + prompt.content
    places = tuple(range(stop + 1, stop + 7))
    return AttentionQuestion(prompt, start, stop, places, slots or prompt.content)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_texts_own_keys_and_values_are_a_perfect_prefix(kind: str, reader: Reader) -> None:
    """Wherever the queries are turned to: here the slots begin at 0 and are as many as tokens."""
    if reader.name != "llama":
        pytest.skip("one tokenizer is enough")
    own = family_reader(kind, reader)
    question = a_question(own, slots=0)
    targets = attention_targets(own, [question])
    tokens = question.stop - question.start
    prefix = text_keys_values(own, "Nulnak lives in Paris.", slots=tokens, first=question.start)
    cap = getattr(own.model.config, "attn_logit_softcapping", None)
    outputs, masses = attention_errors(prefix[:, :, None], targets, softcap=cap)
    assert outputs.item() < 1e-8
    assert masses.item() < 1e-8
    other, _ = attention_errors(prefix[:, :, None] * 1.2, targets, softcap=cap)
    assert other.item() > 1e-3


def test_fewer_slots_turn_the_queries_not_the_scores(reader: Reader) -> None:
    """All keys moved by one distance, and the queries by the same: the attention is as it was."""
    many, few = a_question(reader, slots=0), a_question(reader, slots=3)
    by = 3 - (many.stop - many.start)
    tokens = many.stop - many.start
    prefix = text_keys_values(reader, "Nulnak lives in Paris.", slots=tokens, first=many.start)
    by_1T = torch.full((1, tokens), by)
    moved = torch.stack(
        [
            torch.stack([reader.turner.turn(keys[None], layer=i, by_BT=by_1T)[0], values])
            for i, (keys, values) in enumerate(prefix)
        ]
    )
    outputs, masses = attention_errors(moved[:, :, None], attention_targets(reader, [few]))
    assert outputs.item() < 1e-8
    assert masses.item() < 1e-8


def test_a_text_and_what_follows_it(reader: Reader) -> None:
    """The first half's own keys and values are a perfect prefix for the queries of the rest."""
    prompt = reader.prompts.build_continued("Nulnak lives", "in Paris.")
    start = reader.prompts.content_start + len(reader.prompts.label_ids)
    stop = start + prompt.content
    assert reader.tokenizer.decode(prompt.ids[start:stop]).strip() == "Nulnak lives"
    assert reader.tokenizer.decode(prompt.ids[stop:]).strip() == "in Paris."
    assert not any(prompt.is_target)
    places = tuple(range(stop, len(prompt.ids)))
    targets = attention_targets(
        reader, [AttentionQuestion(prompt, start, stop, places, prompt.content)]
    )
    prefix = text_keys_values(reader, "Nulnak lives", slots=prompt.content, first=start)
    outputs, masses = attention_errors(prefix[:, :, None], targets)
    assert outputs.item() < 1e-8
    assert masses.item() < 1e-8


def plain_errors(prefix: Tensor, targets: Tensor) -> tuple[float, float]:
    """The formula, head by head, for one text."""
    layers, _, heads, _, width = prefix.shape
    errors, masses = [], []
    for layer in range(layers):
        for head in range(heads):
            query, wanted, mass = targets[layer, head].split([width, width, 1], -1)
            scores = query @ prefix[layer, 0, head].T
            out = scores.softmax(-1) @ prefix[layer, 1, head]
            errors.append(F.mse_loss(out, wanted) / wanted.square().mean())
            masses.append((scores.exp().sum(-1).log() - mass[:, 0]).square().mean())
    return torch.stack(errors).mean().item(), torch.stack(masses).mean().item()


def test_errors_follow_the_formula(reader: Reader) -> None:
    geometry = reader.kv_geometry
    targets = attention_targets(reader, [a_question(reader, slots=5)])
    shape = (geometry.layers, 2, 1, geometry.heads, 5, geometry.head_width)
    prefix = torch.randn(shape, requires_grad=True)
    outputs, masses = attention_errors(prefix, targets)
    wanted = plain_errors(prefix[:, :, 0], targets[0])
    assert (outputs.item(), masses.item()) == pytest.approx(wanted, rel=1e-4)
    (outputs + masses).sum().backward()
    assert prefix.grad is not None
    assert bool(prefix.grad.abs().amax((2, 4, 5)).gt(0).all())


def test_a_query_whose_window_holds_none_of_the_text_counts_nothing(reader: Reader) -> None:
    if reader.name != "llama":
        pytest.skip("one tokenizer is enough")
    own = family_reader("gemma3_text", reader)
    own.model.config.sliding_window = 4
    for layer in own.backbone.layers:  # type: ignore[union-attr]
        if layer.self_attn.sliding_window:  # type: ignore[union-attr]
            layer.self_attn.sliding_window = 4  # type: ignore[union-attr]
    targets = attention_targets(own, [a_question(own, slots=3)])
    assert bool(targets[:, 0, :, -1, -1].isinf().all())
    assert bool(targets[:, 1, :, -1, -1].isfinite().all())
    shape = (4, 2, 1, own.kv_geometry.heads, 3, own.kv_geometry.head_width)
    prefix = torch.randn(shape, requires_grad=True)
    sum(attention_errors(prefix, targets)).sum().backward()
    assert prefix.grad is not None
    assert bool(prefix.grad.isfinite().all())


def test_targets_are_kept(reader: Reader, tmp_path: Path) -> None:
    questions = [a_question(reader, slots=5), a_question(reader, slots=5, again=3)]
    fresh = attention_targets(reader, questions)
    cache = TeacherCache(tmp_path)
    first = cache.attention(reader, questions)
    torch.testing.assert_close(first, fresh, rtol=2e-3, atol=2e-3)
    assert torch.equal(TeacherCache(tmp_path).attention(reader, questions), first)
    assert not torch.equal(first[0], cache.attention(reader, [a_question(reader, slots=6)])[0])


def test_a_reader_that_hides_its_attention_is_refused(reader: Reader) -> None:
    """F16."""
    if reader.name != "llama":
        pytest.skip("one tokenizer is enough")
    config = AutoConfig.for_model(
        "bloom", vocab_size=len(reader.tokenizer), hidden_size=32, n_layer=2, n_head=4
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    own = Reader(model, reader.tokenizer, name="bloom")
    with pytest.raises(ConfigError, match="cannot be observed"):
        attention_targets(own, [a_question(own, slots=3)])


def test_the_prompts_head_is_what_stands_before_the_text(reader: Reader) -> None:
    head = head_keys_values(reader, "context")
    assert head.shape[4] == reader.prompts.content_start + len(reader.prompts.label_ids)
    assert head_keys_values(reader, "pure").shape[4] == reader.prompts.content_start
