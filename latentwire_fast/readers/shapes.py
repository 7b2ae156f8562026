"""Shapes of models without their weights: their configurations, sizes and parameter counts.

A model is built on torch's meta device, where tensors have a shape and no memory, so that counts
are exact for every family that transformers has.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    Qwen2Config,
)

from latentwire_fast.errors import ConfigError
from latentwire_fast.readers.kv_cache import key_value_heads
from latentwire_fast.readers.loading import resolve_source

_LLAMA_3: dict[str, Any] = {
    "vocab_size": 128256,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
}
_LLAMA_3_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# Models of the presets as on the hub, whose configurations need no network, nor a package.
KNOWN: dict[str, Any] = {
    "meta-llama/Llama-3.1-8B-Instruct": LlamaConfig(
        **_LLAMA_3,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        rope_parameters=_LLAMA_3_ROPE,
    ),
    "meta-llama/Llama-3.2-1B": LlamaConfig(
        **_LLAMA_3,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        tie_word_embeddings=True,
        rope_parameters={**_LLAMA_3_ROPE, "factor": 32.0},
    ),
    "package:smollm2": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
    "package:gemma3": Gemma3TextConfig(
        vocab_size=262144,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        sliding_window=512,
        tie_word_embeddings=True,
    ),
    "Qwen/Qwen2.5-7B-Instruct": Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    ),
}


def model_config(source: str) -> Any:
    """The configuration of a source, without its weights.

    Raises:
        ConfigError: it is not at hand.
    """
    if source in KNOWN:
        return KNOWN[source]
    try:
        return AutoConfig.from_pretrained(resolve_source(source), trust_remote_code=False)
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(
            f"the shape of {source!r} is not known: {why} (without a network, give a folder with "
            f"its config.json; known are {', '.join(KNOWN)})"
        ) from error


@dataclass(frozen=True)
class Shape:
    """What a decoder's costs depend on.

    Attributes:
        layers, width, inner, heads, kv_heads, head_width, vocabulary: dimensions.
        parameters: all of them, tied ones once.
        embedding: those of the input embeddings, and of the output embeddings unless tied.
        matmul: those that multiply each position: of the layers' matrices.
    """

    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    head_width: int
    vocabulary: int
    parameters: int
    embedding: int
    matmul: int

    @classmethod
    def of(cls, config: Any) -> Shape:
        """The shape of a transformers configuration."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        ends = {model.get_input_embeddings(), model.get_output_embeddings()}
        embedding = {id(module.weight): module.weight.numel() for module in ends}
        matmul = sum(
            module.weight.numel()
            for module in model.modules()
            if isinstance(module, nn.Linear) and module not in ends
        )
        text = config.get_text_config(decoder=True)
        head_width = getattr(text, "head_dim", None)
        return cls(
            text.num_hidden_layers,
            text.hidden_size,
            _inner_width(text),
            text.num_attention_heads,
            key_value_heads(text),
            head_width or text.hidden_size // text.num_attention_heads,
            text.vocab_size,
            sum(parameter.numel() for parameter in model.parameters()),
            sum(embedding.values()),
            matmul,
        )

    def attention_flops(self, positions: int) -> int:
        """Operations of causal attention, in all layers, of a prompt of so many positions."""
        pairs = positions * (positions + 1) // 2
        return 4 * self.layers * self.heads * self.head_width * pairs

    def weight_bytes(self, *, element: int, in_4bit: bool) -> float:
        """Bytes of the weights; in 4 bits the layers' matrices have a scale per 64 values."""
        if not in_4bit:
            return self.parameters * element
        return self.matmul * (0.5 + 4 / 64) + (self.parameters - self.matmul) * element


@cache
def shape_of(source: str) -> Shape:
    """The shape of a source's model.

    Raises:
        ConfigError: as `model_config`.
    """
    return Shape.of(model_config(source))


def _inner_width(config: Any) -> int:
    """Width inside the MLPs; OPT and GPT-2 have names of their own for it."""
    names = ("intermediate_size", "ffn_dim", "n_inner")
    found = (getattr(config, name, None) for name in names)
    return next(filter(None, found), 4 * config.hidden_size)
