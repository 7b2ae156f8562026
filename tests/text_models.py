"""Tiny text encoders with random weights, in folders as Hugging Face has them.

A pytest plugin (named in conftest.py).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

SPECIAL = ("[CLS]", "[SEP]", "[PAD]")


def text_tokenizer(base: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokens of another tokenizer, between `[CLS]` and `[SEP]`."""
    backend = Tokenizer.from_str(base.backend_tokenizer.to_str())
    backend.add_special_tokens([*SPECIAL])
    ids = [(token, backend.token_to_id(token)) for token in SPECIAL]
    backend.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ids[:2])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]"
    )


def save_text_model(kind: str, base: PreTrainedTokenizerFast, folder: Path) -> Path:
    """A `bert` or `roberta` of two layers and width 32 that reads 24 tokens at once."""
    tokenizer = text_tokenizer(base)
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "initializer_range": 0.3,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        if kind == "bert":
            model = BertModel(
                BertConfig(max_position_embeddings=24, **sizes), add_pooling_layer=False
            )
        else:  # its positions begin behind that of the padding
            config = RobertaConfig(max_position_embeddings=26, pad_token_id=1, **sizes)
            model = RobertaModel(config, add_pooling_layer=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bert_folder(
    llama_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with a tiny BERT, without the layer behind its first token. Read only."""
    return save_text_model("bert", llama_tokenizer, tmp_path_factory.mktemp("text") / "bert")


@pytest.fixture(scope="session")
def roberta_folder(
    llama_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with a tiny RoBERTa, with that layer. Read only."""
    return save_text_model("roberta", llama_tokenizer, tmp_path_factory.mktemp("text") / "roberta")
