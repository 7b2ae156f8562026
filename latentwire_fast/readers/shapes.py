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
    BertConfig,
    Gemma3TextConfig,
    LlamaConfig,
    Qwen2Config,
)

from latentwire_fast.errors import ConfigError
from latentwire_fast.readers.kv_cache import key_value_heads
from latentwire_fast.readers.loading import resolve_source


def decoder_sizes(
    *, vocabulary: int, width: int, inner: int, layers: int, heads: int, kv_heads: int
) -> dict[str, Any]:
    """Dimensions under the names that transformers has for them."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


def _llama_3(*, width: int, inner: int, layers: int, factor: float, tied: bool) -> LlamaConfig:
    sizes = {"width": width, "inner": inner, "layers": layers, "heads": 32, "kv_heads": 8}
    return LlamaConfig(
        **decoder_sizes(vocabulary=128256, **sizes),
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )


_SMOLLM2 = decoder_sizes(vocabulary=49152, width=576, inner=1536, layers=30, heads=9, kv_heads=3)
_GEMMA_3 = decoder_sizes(vocabulary=262144, width=640, inner=2048, layers=18, heads=4, kv_heads=1)
_QWEN_7B = decoder_sizes(
    vocabulary=152064, width=3584, inner=18944, layers=28, heads=28, kv_heads=4
)
_MINILM = BertConfig(
    hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12
)
# Models of the presets as on the hub, whose configurations need no network, nor a package.
KNOWN: dict[str, Any] = {
    "sentence-transformers/all-MiniLM-L6-v2": _MINILM,
    "package:minilm": _MINILM,
    "meta-llama/Llama-3.1-8B-Instruct": _llama_3(
        width=4096, inner=14336, layers=32, factor=8.0, tied=False
    ),
    "meta-llama/Llama-3.2-1B": _llama_3(width=2048, inner=8192, layers=16, factor=32.0, tied=True),
    "package:smollm2": LlamaConfig(
        **_SMOLLM2, max_position_embeddings=8192, tie_word_embeddings=True
    ),
    "package:gemma3": Gemma3TextConfig(
        **_GEMMA_3, head_dim=256, sliding_window=512, tie_word_embeddings=True
    ),
    "Qwen/Qwen2.5-7B-Instruct": Qwen2Config(
        **_QWEN_7B,
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
class Dims:
    """Dimensions of a decoder that its costs depend on."""

    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    head_width: int
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> Dims:
        """The dimensions of a transformers configuration."""
        config = config.get_text_config(decoder=True)
        head_width = getattr(config, "head_dim", None)
        return Dims(
            config.num_hidden_layers,
            config.hidden_size,
            _inner_width(config),
            config.num_attention_heads,
            key_value_heads(config),
            head_width or config.hidden_size // config.num_attention_heads,
            config.vocab_size,
        )


@dataclass(frozen=True)
class Shape(Dims):
    """What a decoder's costs depend on: its dimensions and how many weights it has.

    Attributes:
        parameters: all of them, tied ones once.
        embedding: those of the input embeddings, and of the output embeddings unless tied.
        matmul: those that multiply each position: of the layers' matrices.
    """

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
        return cls(
            **vars(Dims.of(config)),
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            embedding=sum(embedding.values()),
            matmul=matmul,
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
