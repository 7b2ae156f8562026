"""Tiny random models of many families, each made from its own configuration.

`READERS` are the families that everything is tried with; `OTHERS` the ones that the probe alone is
shown, with what it is to find.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

WINDOW = 8
HALF_WINDOWED = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
}
GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        name: as people call it.
        kind: as transformers does.
        options: of its configuration, beside the common sizes.
        without: common sizes that it has other words for.
        attention: the implementation to load it with.
    """

    name: str
    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    attention: str = "sdpa"

    def model(self, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
        """A model of two layers (or a few more) and width 64, with wide random weights."""
        sizes = {
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "initializer_range": 0.15,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        }
        sizes = {name: value for name, value in sizes.items() if name not in self.without}
        config = AutoConfig.for_model(self.kind, **{**sizes, **self.options})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return AutoModelForCausalLM.from_config(config).eval()


READERS = (
    Family("Llama", "llama"),
    Family("Qwen2", "qwen2"),
    Family("Qwen3", "qwen3", {"head_dim": 16}),
    Family("Mistral", "mistral", {"head_dim": 16, "sliding_window": None}),
    Family("Mistral, window", "mistral", {"head_dim": 16, "sliding_window": WINDOW}),
    Family("Gemma", "gemma", {"head_dim": 16}),
    Family("Gemma 2", "gemma2", {"head_dim": 16, "sliding_window": WINDOW}, attention="eager"),
    Family("Gemma 3", "gemma3_text", {"head_dim": 16, **HALF_WINDOWED}),
    Family("Phi-3", "phi3"),
    Family("GPT-2", "gpt2", GPT),
    Family("OPT", "opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    Family("GPT-NeoX", "gpt_neox"),
    Family("OLMo 2", "olmo2"),
    Family("SmolLM3", "smollm3"),
    Family("StableLM", "stablelm"),
    Family("Granite", "granite", {"logits_scaling": 8.0, "embedding_multiplier": 12.0}),
    Family("Cohere", "cohere"),
    Family("Mixtral", "mixtral", {"num_local_experts": 4, "sliding_window": None}),
    Family("OLMoE", "olmoe", EXPERTS),
)

_STATES = "layer 0 keeps its past in a Linear"
_ONE_BY_ONE = "when it decodes a batch of several lengths it computes something else"
_HYBRID = {"deep": _STATES, "together": _ONE_BY_ONE}
_BART = {
    "d_model": 64,
    "decoder_layers": 2,
    "encoder_layers": 2,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_ffn_dim": 96,
    "encoder_ffn_dim": 96,
    "init_std": 0.15,
}
_MPT = {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 512}
_GPT_NEO = {
    "num_layers": 2,
    "num_heads": 4,
    "window_size": WINDOW,
    "attention_types": [[["global", "local"], 1]],
}
_DEEPSEEK = {
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 24,
    "first_k_dense_replace": 1,
}
_LFM2 = {"layer_types": ["conv", "full_attention"], "full_attn_idxs": [1]}
_JAMBA = {
    "num_experts": 2,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "use_mamba_kernels": False,
    "mamba_d_state": 8,
}
_QWEN3_NEXT = {
    "num_hidden_layers": 4,
    "head_dim": 16,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    **EXPERTS,
}
_BAMBA = {
    "attn_layer_indices": [1],
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
}
_FALCON_H1 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_ssm": 128,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "head_dim": 16,
}
_GEMMA4 = {
    "head_dim": 16,
    "global_head_dim": 32,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    **HALF_WINDOWED,
}
_LLAMA4 = {
    "head_dim": 16,
    "num_local_experts": 2,
    "intermediate_size_mlp": 96,
    "attention_chunk_size": WINDOW,
}
_GPT_OSS = {
    "head_dim": 16,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    **HALF_WINDOWED,
}
_XGLM = {"d_model": 64, "num_layers": 2, "attention_heads": 4, "ffn_dim": 96}
_NO_HEADS = ("num_key_value_heads",)

# What the probe is to find: the uses that are refused, and how the reasons begin.
OTHERS: tuple[tuple[Family, dict[str, str]], ...] = (
    (
        Family("Bart's decoder", "bart", _BART),
        {"together": _ONE_BY_ONE, "left": "in a batch padded on the left it computes"},
    ),
    (Family("MPT", "mpt", _MPT, ("max_position_embeddings",)), {}),
    (Family("GPT-Neo", "gpt_neo", _GPT_NEO), {}),
    (Family("GPT-J", "gptj", {**GPT, "rotary_dim": 8}), {}),
    (Family("CodeGen", "codegen", {**GPT, "rotary_dim": 8}), {}),
    (Family("Bloom", "bloom", {"n_layer": 2, "n_head": 4}), {}),
    (Family("Falcon, one key head", "falcon", {}, _NO_HEADS), {}),
    (Family("Falcon, ALiBi", "falcon", {"alibi": True}, _NO_HEADS), {}),
    (
        Family("Falcon, new form", "falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
        {},
    ),
    (Family("Phi", "phi"), {}),
    (Family("Persimmon", "persimmon"), {}),
    (Family("XGLM", "xglm", _XGLM), {}),
    (Family("BioGPT", "biogpt"), {}),
    (Family("Ernie 4.5", "ernie4_5", {"head_dim": 16}), {}),
    (Family("EXAONE 4", "exaone4", HALF_WINDOWED), {}),
    (Family("Cohere 2", "cohere2", HALF_WINDOWED), {}),
    (Family("gpt-oss", "gpt_oss", _GPT_OSS), {}),
    (Family("Llama 4 (text)", "llama4_text", _LLAMA4), {}),
    (
        Family("DeepSeek-V3", "deepseek_v3", _DEEPSEEK),
        {"deep": "its keys are "},
    ),
    (
        Family("Gemma 4 (text)", "gemma4_text", _GEMMA4),
        {"deep": "layer 0 has 2 key/value heads of width 16, layer 1 2 of width 32"},
    ),
    (Family("Qwen3-Next", "qwen3_next", _QWEN3_NEXT), _HYBRID),
    (Family("LFM2", "lfm2", _LFM2), _HYBRID),
    (Family("Jamba", "jamba", _JAMBA), _HYBRID),
    (Family("Bamba", "bamba", _BAMBA), _HYBRID),
    (Family("Falcon-H1", "falcon_h1", _FALCON_H1), _HYBRID),
    (Family("Mamba", "mamba", {"state_size": 8}), {"reads": "when it decodes it "}),
    (Family("RWKV", "rwkv"), {"reads": "when it decodes it "}),
    (Family("GPT (OpenAI's first)", "openai-gpt", GPT), {"reads": "when it decodes it "}),
)
