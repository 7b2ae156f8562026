"""F1: the size of a reader's embeddings is that of what it reads, wherever its family scales."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from latentwire_fast.errors import ConfigError
from latentwire_fast.models.lm_text import LMFacts
from latentwire_fast.models.poolers.queries import expected_embeddings
from latentwire_fast.prompts.builder import PromptBuilder
from latentwire_fast.readers import embeddings
from latentwire_fast.readers.embeddings import embedding_size, expected_embedding
from latentwire_fast.readers.logits import LogitTransform
from latentwire_fast.readers.reader import Reader

WIDTH = 32


def gemma3(vocabulary: int) -> PreTrainedModel:
    """Scales inside the embedding module, by the square root of the width."""
    config = Gemma3TextConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    return Gemma3ForCausalLM(config)


def granite(vocabulary: int) -> PreTrainedModel:
    """Scales behind it, prefixes too: they are to have the table's own size."""
    config = GraniteConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        embedding_multiplier=12.0,
    )
    return GraniteForCausalLM(config)


def opt(vocabulary: int) -> PreTrainedModel:
    """Embeddings of another width than its layers, projected behind the module."""
    config = OPTConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        word_embed_proj_dim=WIDTH,
        ffn_dim=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    return OPTForCausalLM(config)


@pytest.mark.parametrize(("build", "factor"), [(gemma3, WIDTH**0.5), (granite, 1.0), (opt, 1.0)])
def test_the_rms_is_that_of_what_the_reader_reads(
    build: type[PreTrainedModel], factor: float, llama_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = build(len(llama_tokenizer))
    reader = Reader(model, llama_tokenizer, name="reader")
    ids = torch.arange(len(llama_tokenizer))
    expected = reader.embedding(ids).double().square().mean().sqrt().item()
    assert reader.embedding_rms == pytest.approx(expected, rel=1e-6)
    table = reader.embedding.weight.double().square().mean().sqrt().item()
    assert reader.embedding_rms == pytest.approx(factor * table, rel=1e-3)
    assert reader.d_model == WIDTH


def test_an_encoder_starts_from_what_its_lm_reads(
    llama_tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Queries begin as the anchor's embedding, with noise of that size."""
    model, prompts = gemma3(len(llama_tokenizer)), PromptBuilder(llama_tokenizer)
    facts = LMFacts.of(model.model, prompts, latents=2, source="gemma")
    table = model.get_input_embeddings().weight
    torch.testing.assert_close(facts.anchor_D, table[prompts.anchor_ids[-1]] * WIDTH**0.5)
    assert facts.embedding_std == pytest.approx(table.std().item() * WIDTH**0.5, rel=1e-4)


def test_an_encoder_lm_of_two_widths_is_refused(llama_tokenizer: PreTrainedTokenizerFast) -> None:
    model, prompts = opt(len(llama_tokenizer)), PromptBuilder(llama_tokenizer)
    with pytest.raises(
        ConfigError, match="'opt' has embeddings of width 32 and layers of width 64"
    ):
        LMFacts.of(model.model, prompts, latents=2, source="opt")


@pytest.mark.parametrize("build", [gemma3, granite])
def test_rehearsals_go_on_from_embeddings_that_the_lm_reads(
    build: type[PreTrainedModel], llama_tokenizer: PreTrainedTokenizerFast
) -> None:
    """An LM that is certain of a token gives its query that token's embedding, as it is read."""
    embedding = build(len(llama_tokenizer)).get_input_embeddings()
    certain = 1e4 * embedding.weight[7] / embedding.weight[7].square().sum()
    expected = embedding(torch.tensor([[7]]))
    found = expected_embeddings(certain[None, None], embedding, LogitTransform())
    torch.testing.assert_close(found, expected)
    capped = expected_embeddings(certain[None, None], embedding, LogitTransform(softcap=0.1))
    assert (capped.norm() < 0.1 * expected.norm()).item(), "a cap leaves nothing certain"


def test_chunks_of_a_vocabulary_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    embedding = nn.Embedding(11, 3)
    whole = embedding.weight.double()
    probs = torch.rand(2, 5, 11)

    class Doubled(nn.Embedding):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    doubled = Doubled(11, 3, _weight=embedding.weight.detach())
    for chunk in (1, 12, 1000):
        monkeypatch.setattr(embeddings, "CHUNK", chunk)
        size = embedding_size(embedding)
        assert size.rms == pytest.approx(whole.square().mean().sqrt().item(), rel=1e-6)
        assert size.std == pytest.approx(whole.std().item(), rel=1e-6)
        torch.testing.assert_close(expected_embedding(probs, doubled), 2 * probs @ embedding.weight)
