"""Encoders: a text has one latent, alone or in any batch; what is trained gets gradients."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from latentwire_fast.config.schema import EncoderConfig, StageConfig
from latentwire_fast.config.serialization import run_config_from_json, to_json
from latentwire_fast.data.examples import Example
from latentwire_fast.errors import ConfigError, DataError
from latentwire_fast.models.encoders.base import Encoder, build_encoder, rms_normalize
from latentwire_fast.models.encoders.byte import ByteEncoder
from latentwire_fast.models.encoders.lm import LMEncoder
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.models.poolers.spans import pool_spans
from latentwire_fast.readers.loading import load_tokenizer
from latentwire_fast.readers.reader import Reader, load_readers
from latentwire_fast.registry import ENCODERS, POOLERS
from latentwire_fast.training.builders import build_model
from runs import tiny_config, train

CONFIGS = {
    "queries": ENCODERS.config("lm", latents=5, d_z=8, pooler=POOLERS.config("queries")),
    "spans": ENCODERS.config("lm", latents=5, d_z=8, pooler=POOLERS.config("spans")),
    "selected": ENCODERS.config("lm", latents=5, d_z=8, pooler=POOLERS.config("selected")),
    "byte": ENCODERS.config("byte", latents=5, d_z=8, width=16, layers=2),
    "byte_gates": ENCODERS.config("byte", latents=5, d_z=8, width=16, layers=2, gate="slots"),
    "byte_spans": ENCODERS.config(
        "byte", latents=5, d_z=8, width=16, layers=1, pooler=POOLERS.config("spans")
    ),
}


@pytest.fixture(params=["llama", "qwen"])
def source(request: pytest.FixtureRequest, readers: dict[str, Reader]) -> Reader:
    return readers[request.param]


def make(config: EncoderConfig, reader: Reader) -> Encoder:
    torch.manual_seed(1)
    if config.source is not None:
        config = config.with_source(reader.source)
    return build_encoder(config, {reader.name: reader}).eval()


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def encoder(request: pytest.FixtureRequest, readers: dict[str, Reader]) -> Encoder:
    return make(request.param, readers["llama"])


@pytest.fixture
def texts(examples: list[Example]) -> tuple[list[str], list[str]]:
    """Contexts and questions, the shortest and the longest side by side."""
    chosen = [examples[i] for i in (0, -1, 5, 9, 1)]
    return [e.context for e in chosen], [e.question for e in chosen]


# --- one latent per text ------------------------------------------------------------------------


@pytest.mark.parametrize("question", [None, "Who?"], ids=["context", "pure"])
def test_the_longest_text_that_is_read(encoder: Encoder, question: str | None) -> None:
    if encoder.config.kind == "byte":
        limit, unit = encoder.config.max_bytes, "bytes"
    else:
        limit, unit = encoder.config.max_tokens, "tokens"
    encoder.check_length("short", question)
    with pytest.raises(
        DataError, match=rf"the text has [\d,]+ {unit}, the encoder reads {limit:,}"
    ):
        encoder.check_length("long " * limit, question)


@pytest.mark.parametrize("pure", [False, True], ids=["context", "pure"])
@torch.no_grad()
def test_a_text_has_the_same_latent_alone_and_in_a_ragged_batch(
    encoder: Encoder, texts: tuple[list[str], list[str]], pure: bool
) -> None:
    contexts, questions = texts
    batch = encoder(contexts, questions if pure else None)
    assert batch.shape == (len(contexts), 5, 8)
    assert batch.dtype == torch.float32
    for i, context in enumerate(contexts):
        alone = encoder([context], [questions[i]] if pure else None)
        torch.testing.assert_close(batch[i : i + 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 6, 7, 8, 37])
@torch.no_grad()
def test_bytes_of_every_remainder_are_padded_alike(readers: dict[str, Reader], length: int) -> None:
    """The convolutions stride over four bytes: the border of a text must not see the padding."""
    encoder = make(CONFIGS["byte"], readers["llama"])
    text, longer = "x" * length, "some longer text " * 5
    batch = encoder([text, longer, text])
    alone = encoder([text])
    torch.testing.assert_close(batch[:1], alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(batch[2:], alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_different_texts_have_different_latents(
    encoder: Encoder, texts: tuple[list[str], list[str]]
) -> None:
    contexts, questions = texts
    latents = encoder(contexts).flatten(1)
    distances = torch.cdist(latents, latents) + torch.eye(len(contexts)) * 9
    assert distances.min() > 1e-3
    assert not torch.allclose(encoder(contexts, questions).flatten(1), latents, atol=1e-3)
    other = encoder(contexts, list(reversed(questions)))
    assert not torch.allclose(other, encoder(contexts, questions), atol=1e-3)


@torch.no_grad()
def test_latents_have_unit_rms(encoder: Encoder, texts: tuple[list[str], list[str]]) -> None:
    rms = encoder(texts[0]).pow(2).mean(-1).sqrt()
    torch.testing.assert_close(rms, torch.ones_like(rms), rtol=1e-3, atol=1e-3)


def test_rms_normalize_keeps_zero_and_direction() -> None:
    latent = torch.randn(3, 4, 8, dtype=torch.float64)
    latent[0, 0] = 0
    normal = rms_normalize(latent)
    assert not normal[0, 0].any()
    cosine = nn.functional.cosine_similarity(normal[1:], latent[1:], dim=-1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine))


@torch.no_grad()
def test_text_beyond_the_limit_is_cut(readers: dict[str, Reader]) -> None:
    text = "Nulnak is already 94 years old. " * 6
    limited = make(replace(CONFIGS["byte"], max_bytes=40), readers["llama"])
    assert torch.equal(limited([text]), limited([text[:60]]))
    assert not torch.equal(limited([text]), limited([text[:20]]))
    lm = make(replace(CONFIGS["spans"], max_tokens=10), readers["llama"])
    assert torch.equal(lm([text]), lm([text[:100]]))


@torch.no_grad()
def test_any_unicode_is_encoded(encoder: Encoder) -> None:
    latents = encoder(["", "é", "日本語 🙂", "a\x00b", "</s><s>[INST]"])
    assert latents.isfinite().all()


# --- pooling ------------------------------------------------------------------------------------


def pool_with_a_loop(hidden_BTD: Tensor, lengths: list[int], spans: int) -> Tensor:
    rows = []
    for hidden_TD, length in zip(hidden_BTD, lengths, strict=True):
        parts = []
        for i in range(spans):
            start, stop = i * length // spans, (i + 1) * length // spans
            parts.append(hidden_TD[start : max(stop, start + 1)].mean(0))
        rows.append(torch.stack(parts))
    return torch.stack(rows)


@pytest.mark.parametrize("spans", [1, 2, 5, 12])
def test_pool_spans_is_the_loop(spans: int) -> None:
    lengths = [1, 2, 3, 4, 5, 7, 11, 12, 13, 24, 25]
    hidden = torch.randn(len(lengths), 25, 6, dtype=torch.float64)
    pooled = pool_spans(hidden, torch.tensor(lengths), spans)
    torch.testing.assert_close(pooled, pool_with_a_loop(hidden, lengths, spans))


def test_pool_spans_reads_no_padding() -> None:
    lengths = torch.tensor([1, 3, 8])
    hidden = torch.randn(3, 8, 4)
    changed = hidden.clone()
    for row, length in enumerate(lengths):
        changed[row, length:] = 1e6
    assert torch.equal(pool_spans(hidden, lengths, 5), pool_spans(changed, lengths, 5))


def test_a_row_shorter_than_the_spans_repeats_its_positions() -> None:
    hidden = torch.arange(3.0).view(1, 3, 1)
    pooled = pool_spans(hidden, torch.tensor([2]), 4)
    assert pooled.flatten().tolist() == [0.0, 0.0, 1.0, 1.0]


def test_spans_of_equal_length_partition_the_row() -> None:
    hidden = torch.randn(2, 12, 3, dtype=torch.float64)
    pooled = pool_spans(hidden, torch.tensor([12, 12]), 4)
    torch.testing.assert_close(pooled.mean(1), hidden.mean(1))


# --- LM encoders --------------------------------------------------------------------------------


def test_an_lm_encoder_starts_from_the_readers_weights_and_leaves_them(source: Reader) -> None:
    before = source.weights_digest()
    encoder = make(CONFIGS["queries"], source)
    assert isinstance(encoder, LMEncoder)
    core = dict(encoder.core.named_parameters())
    for name, weight in source.backbone.named_parameters():
        assert torch.equal(core[name], weight)
        assert core[name] is not weight
        assert core[name].requires_grad
        assert not weight.requires_grad
    with torch.no_grad():
        core["embed_tokens.weight"].add_(1.0)
    assert source.weights_digest() == before


@torch.no_grad()
def test_queries_are_read_after_the_text(readers: dict[str, Reader]) -> None:
    """Against the LM called by hand: the memory tokens' last hidden states, projected."""
    reader = readers["llama"]
    encoder = make(CONFIGS["queries"], reader)
    assert isinstance(encoder, LMEncoder)
    context = "Nulnak is already 94 years old."
    ids = encoder.prompts.build_context(context).ids
    embeds = torch.cat(
        [encoder.core.get_input_embeddings()(torch.tensor(ids)), encoder.pooler.memory]
    )
    hidden = encoder.core(inputs_embeds=embeds[None], use_cache=False).last_hidden_state[0]
    expected = rms_normalize(encoder.project(encoder.norm(hidden[len(ids) :])))
    torch.testing.assert_close(encoder([context])[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooler", ["queries", "spans"])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_frozen_core_gets_no_gradient(source: Reader, pooler: str, frozen: bool) -> None:
    encoder = make(replace(CONFIGS[pooler], frozen=frozen), source).train()
    assert isinstance(encoder, LMEncoder)
    (encoder(["Nulnak is old.", "The dog."]) * torch.randn(2, 5, 8)).sum().backward()
    has_gradient = {n for n, p in encoder.named_parameters() if p.grad is not None}
    assert all(p.requires_grad != frozen for p in encoder.core.parameters())
    added = {n for n, _ in encoder.named_parameters() if not n.startswith("core.")}
    assert added == {
        *("norm.weight", "norm.bias", "project.weight", "project.bias"),
        *({"pooler.memory"} if pooler != "spans" else ()),
    }
    core = {n for n, _ in encoder.named_parameters() if n.startswith("core.")}
    assert has_gradient == (added if frozen else added | core)


@pytest.mark.parametrize("kind", ["byte", "byte_gates", "byte_spans"])
def test_the_byte_encoder_trains_every_parameter(readers: dict[str, Reader], kind: str) -> None:
    encoder = make(CONFIGS[kind], readers["llama"]).train()
    assert isinstance(encoder, ByteEncoder)
    text = ["Nulnak is already 94 years old and lives in a town.", "The dog."]
    (encoder(text) * torch.randn(2, 5, 8)).sum().backward()
    without = [n for n, p in encoder.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []
    assert not encoder.embed.weight.grad[ByteEncoder.PAD].any(), "padding learns nothing"


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("pooler", [None, "cross_attention"])
def test_a_byte_encoder_of_six_layers_is_trained_saved_and_loaded(
    llama_folder: Path, qwen_folder: Path, tmp_path: Path, pooler: str | None
) -> None:
    options = {"gate": "slots"} if pooler is None else {"pooler": POOLERS.config(pooler, heads=2)}
    encoder = ENCODERS.config(
        "byte", latents=4, d_z=8, width=16, heads=2, layers=6, max_bytes=512, **options
    )
    config = tiny_config(
        llama_folder, qwen_folder, stages=(StageConfig("answer", steps=2, quantize=6),)
    )
    config = replace(config, encoder=encoder)
    assert run_config_from_json(to_json(config)) == config
    trained = train(config, tmp_path).session.model.eval()
    loaded = Interlingua.from_pretrained(tmp_path / "model")
    texts = ["Nulnak is already 94 years old.", "The dog."]
    assert torch.equal(loaded.encode(texts), trained.encode(texts))


def test_an_encoder_from_a_folder_that_is_no_reader(readers: dict[str, Reader]) -> None:
    """The source is loaded by itself when no reader of the run has it."""
    config = replace(CONFIGS["spans"], source=readers["qwen"].source)
    encoder = build_encoder(config, {"llama": readers["llama"]})
    assert isinstance(encoder, LMEncoder)
    assert encoder.core.config.model_type == "qwen2"
    weights = dict(readers["qwen"].backbone.named_parameters())
    assert all(torch.equal(p, weights[n]) for n, p in encoder.core.named_parameters())
    assert all(p.requires_grad for p in encoder.core.parameters())


@pytest.mark.parametrize("preset", ["testbed", "mine"])
def test_rehearsals_with_untied_embeddings_say_who_asks_for_them(
    llama_folder: Path, tmp_path: Path, preset: str
) -> None:
    """Nobody set them on the command line: the preset did."""
    model = LlamaForCausalLM.from_pretrained(llama_folder, tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    load_tokenizer(llama_folder).save_pretrained(tmp_path)
    encoder = {"source": str(tmp_path), "pooler": POOLERS.config("queries", rehearsals=2)}
    config = tiny_config(llama_folder, preset=preset, encoder=encoder)
    wanted = (
        rf"preset '{preset}': encoder\.pooler\.rehearsals=2 needs .* tied embeddings, and .*"
        rf"{tmp_path.name}.*another LM \(--encoder\), or set rehearsals to 0"
    )
    with pytest.raises(ConfigError, match=wanted):
        build_model(config, load_readers(config.readers))


# --- what stands around the text ------------------------------------------------------------------


@torch.no_grad()
def test_scaffolds_are_the_template_plain_words_or_nothing(source: Reader) -> None:
    context, latents = "Nulnak is old.", []
    template = source.tokenizer.chat_template
    for scaffold, before in (("neutral", "User:\n"), ("none", "")):
        encoder = make(replace(CONFIGS["spans"], scaffold=scaffold), source)
        assert isinstance(encoder, LMEncoder)
        ids = encoder.prompts.build_context(context).ids
        bos = [source.tokenizer.bos_token_id] if source.tokenizer.bos_token_id is not None else []
        text = source.prompts.text_ids
        assert ids == [*bos, *(text(before) if before else []), *text(f"Context: {context}")]
        latents.append(encoder([context, "The dog."]))
        torch.testing.assert_close(latents[-1][:1], encoder([context]), rtol=1e-4, atol=1e-5)
    latents.append(make(replace(CONFIGS["spans"], scaffold="chat"), source)([context, "The dog."]))
    assert torch.cdist(*[torch.stack(latents).flatten(1)] * 2)[0, 1:].min() > 1e-3
    assert torch.equal(latents[-1], make(CONFIGS["spans"], source)([context, "The dog."]))
    assert source.tokenizer.chat_template == template, "the reader's own is as it was"


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("pure", [False, True], ids=["context", "pure"])
def test_a_neutral_scaffold_is_trained_saved_and_loaded(
    llama_folder: Path, qwen_folder: Path, tmp_path: Path, pure: bool
) -> None:
    config = tiny_config(
        llama_folder,
        qwen_folder,
        mode="pure" if pure else "context",
        stages=(StageConfig("answer", steps=2),),
        encoder={"source": str(llama_folder), "scaffold": "neutral"},
    )
    trained = train(config, tmp_path).session.model.eval()
    loaded = Interlingua.from_pretrained(tmp_path / "model")
    texts = [["Nulnak is already 94 years old."], *([["Who?"]] if pure else [])]
    assert torch.equal(loaded.encode(*texts), trained.encode(*texts))
    assert loaded.encoder.prompts.build_context("a").ids == (
        trained.encoder.prompts.build_context("a").ids
    )
