"""Two tiny frozen readers with random weights: what tests read with.

A pytest plugin (named in conftest.py). The tokenizers are the testbed's own, trained once per
session; the models have grouped K/V heads and take milliseconds. Their answers mean nothing, but no
two prompts get the same logits, so that a wrong mask, position or prefix shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from latentwire_fast.config.schema import Mode
from latentwire_fast.data.examples import Example
from latentwire_fast.data.testbed import make_examples
from latentwire_fast.models.encoders.base import build_encoder
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.readers.card import ReaderCard
from latentwire_fast.readers.reader import Reader
from latentwire_fast.registry import ADAPTERS, ATTACHMENTS, BOTTLENECKS, ENCODERS
from latentwire_fast.testbed.tokenizers import (
    build_llama_tokenizer,
    build_mistral_tokenizer,
    build_qwen_tokenizer,
)

LORA_METHODS = ("text_lora", "closed_book_lora")  # of readers with a LoRA
BUDGETS_IN_BYTES = ("byte_budget", "selective_context_bytes", "bm25_sentences_bytes")
OPTIONAL_METHODS = ("pca", "latent_alone", "latent_hinted", "hybrid")  # where a run asks for them
METHODS = (  # what an evaluation gives a reader to read
    "text",
    "latent",
    "token_budget",
    "token_budget_question",
    "byte_budget",
    "selective_context",
    "selective_context_bytes",
    "bm25_sentences",
    "bm25_sentences_bytes",
    "closed_book",
    "shuffled_latent",
    "zero_latent",
    "embedding_replay",
)


def tiny_model(
    architecture: str, tokenizer: PreTrainedTokenizerFast, *, seed: int = 0
) -> PreTrainedModel:
    """A random `llama` (width 32) or `qwen2` (width 48) causal LM of two layers, in eval mode.

    Weights are drawn wide (0.3), so that attention is far from uniform and predictions differ.
    """
    shape = {
        "vocab_size": len(tokenizer),
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "tie_word_embeddings": True,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if architecture == "llama":
            config = LlamaConfig(hidden_size=32, num_attention_heads=4, **shape)
            return LlamaForCausalLM(config).eval()
        config = Qwen2Config(hidden_size=48, num_attention_heads=6, **shape)
        return Qwen2ForCausalLM(config).eval()


def tiny_interlingua(readers: dict[str, Reader], mode: Mode, *, latents: int = 4) -> Interlingua:
    """An untrained model for these readers: byte encoder, `latents` x 8 at 6 bits, MLP adapters."""
    encoder = ENCODERS.config("byte", latents=latents, d_z=8, width=16, layers=1, heads=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = Interlingua(
            build_encoder(encoder, readers),
            {name: ReaderCard.of(reader) for name, reader in readers.items()},
            bottleneck=BOTTLENECKS.config("uniform", bits=6, group_size=16),
            attachments=(ATTACHMENTS.config("soft", adapter=ADAPTERS.config("mlp", expansion=2)),),
            mode=mode,
        )
    return model.eval()


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs use no GPU: bits are compared. Accelerate keeps its choice until it is reset."""
    from accelerate.state import AcceleratorState  # the kernels' tests run where it is not

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def llama_tokenizer() -> PreTrainedTokenizerFast:
    """The testbed's byte-level BPE."""
    return build_llama_tokenizer()


@pytest.fixture(scope="session")
def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """The testbed's Metaspace BPE."""
    return build_qwen_tokenizer()


@pytest.fixture(scope="session")
def mistral_tokenizer() -> PreTrainedTokenizerFast:
    """The testbed's Metaspace BPE that begins every text with a space."""
    return build_mistral_tokenizer()


def _save(
    architecture: str, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("readers") / architecture
    tiny_model(architecture, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama_folder(
    llama_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A Hugging Face folder with a tiny Llama. Read only."""
    return _save("llama", llama_tokenizer, tmp_path_factory)


@pytest.fixture(scope="session")
def qwen_folder(
    qwen_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A Hugging Face folder with a tiny Qwen2. Read only."""
    return _save("qwen2", qwen_tokenizer, tmp_path_factory)


@pytest.fixture(scope="session")
def other_llama(
    llama_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Another Llama of the same tokenizer. Read only."""
    folder = tmp_path_factory.mktemp("teachers") / "other"
    tiny_model("llama", llama_tokenizer, seed=1).save_pretrained(folder)
    llama_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def readers(llama_folder: Path, qwen_folder: Path) -> dict[str, Reader]:
    """Both tiny readers by name, shared: nothing may change them."""
    return {
        "llama": Reader.load(llama_folder, name="llama"),
        "qwen": Reader.load(qwen_folder, name="qwen"),
    }


@pytest.fixture(scope="session", params=["llama", "qwen"])
def reader(request: pytest.FixtureRequest, readers: dict[str, Reader]) -> Reader:
    """Each of the tiny readers in turn."""
    return readers[request.param]


@pytest.fixture(scope="session")
def examples() -> list[Example]:
    """Sixteen held-out testbed examples of ragged length."""
    return [
        example
        for facts in (1, 2, 4, 6)
        for example in make_examples(4, seed=10 + facts, facts=facts)
    ]
