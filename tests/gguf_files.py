"""Writes a model of transformers as a GGUF file, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from latentwire_fast.readers.sources import gguf_file

CONTROL, NORMAL = 3, 1
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.layers.": "blk.",
}


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    half: bool = False,
    without: str = "",
    **facts: Any,
) -> Path:
    """A tiny Llama and its byte-level BPE as a GGUF file.

    Args:
        half: F16 tensors; F32 otherwise.
        without: a tensor that is left out.
        facts: `pre`, `template`, `eot`: metadata of the tokenizer.
    """
    gguf = pytest.importorskip("gguf")
    if not gguf_file.knows_tokenizers():
        pytest.skip("this transformers makes other tokenizers of GGUF files")
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, tokenizer, **facts)
    for name, weight in model.state_dict().items():
        short = name
        for theirs, its in NAMES.items():
            short = short.replace(theirs, its)
        if short not in ("lm_head.weight", without):  # the head is the embedding
            array = _stored(weight, name, config).numpy()
            writer.add_tensor(short, array.astype(np.float16) if half else array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _stored(weight: Tensor, name: str, config: Any) -> Tensor:
    """Queries and keys of a Llama lie in another order of rows there."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for part, count in heads.items():
        if part in name:
            halves = weight.reshape(count, 2, -1, weight.shape[1])
            return halves.transpose(1, 2).reshape(weight.shape).contiguous()
    return weight


def _add_tokenizer(
    writer: Any,
    tokenizer: PreTrainedTokenizerFast,
    *,
    pre: str = "gpt-2",
    template: str | None = None,
    eot: int | None = None,
) -> None:
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special = set(tokenizer.all_special_ids)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL if i in special else NORMAL for i in range(len(tokens))])
    writer.add_token_merges([" ".join(pair) for pair in backend["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    if template is not None:
        writer.add_chat_template(template)
    if eot is not None:
        writer.add_eot_token_id(eot)
