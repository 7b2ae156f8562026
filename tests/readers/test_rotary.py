"""F15: a key turned to a slot against the same token's key computed there, family by family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from latentwire_fast.errors import ConfigError
from latentwire_fast.readers.rotary import Turner

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOWED = ["sliding_attention", "full_attention"] * 2
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 32,
    "factor": 4.0,
}
TURNED: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 16},
    "gemma3_text": {"head_dim": 16, "layer_types": WINDOWED, "sliding_window": 4},  # two bases
    "smollm3": {"no_rope_layers": [1, 1, 1, 0]},  # a layer without rotation
    "ernie4_5": {},  # pairs of channels
    "cohere": {},  # pairs of channels
    "phi3": {"rope_parameters": LONGROPE},  # other frequencies for long texts
    "gpt_neox": {},  # a quarter of a head
    "phi": {},
    "stablelm": {},
    "glm": {"head_dim": 16},
    "persimmon": {},
    "falcon": {"alibi": False},  # one key/value head
    "olmo2": {},
    "granite": {},
    "gpt_oss": {"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1},
    "mixtral": {"num_local_experts": 2},
}
REFUSED: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},  # a table of positions
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},  # no rotary module
}


def tiny(kind: str, options: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SMALL, **options})
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


@torch.no_grad()
def keys(model: PreTrainedModel, ids: Tensor, positions: Tensor) -> list[Tensor]:
    cache: Any = DynamicCache()
    model.base_model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)
    return [layer.keys for layer in cache.layers]


@pytest.mark.parametrize("kind", TURNED)
@pytest.mark.parametrize("length", [12, 40], ids=["short", "long"])
def test_a_turned_key_is_the_key_computed_there(kind: str, length: int) -> None:
    """Layer 0, whose keys depend on token and position alone, for tokens moved by various steps;
    all layers, for a text moved as a whole."""
    model = tiny(kind, TURNED[kind])
    turner = Turner(model, name=kind)
    ids = torch.randint(3, 64, (1, length))
    place = torch.arange(length)[None] + 7
    before = keys(model, ids, place)
    slots = place * 5 // 9
    # A pass as long as the first takes the frequencies that the first one took.
    ids_2, place_2 = torch.cat([ids, ids], 1), torch.cat([slots, place], 1)
    there = keys(model, ids_2, place_2)[0][:, :, :length]
    turned = turner.turn(before[0], layer=0, by_BT=slots - place, last=int(place.max()))
    torch.testing.assert_close(turned, there, rtol=1e-4, atol=1e-5)
    for layer, (own, moved) in enumerate(zip(before, keys(model, ids, place - 3), strict=True)):
        if int(place.max()) > 32 >= int(place.max()) - 3 and kind == "phi3":
            continue
        found = turner.turn(own, layer=layer, by_BT=torch.full((1, length), -3), last=length + 6)
        torch.testing.assert_close(found, moved, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", REFUSED)
def test_a_reader_whose_keys_cannot_be_turned_is_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match="cannot be computed from those at another"):
        Turner(tiny(kind, REFUSED[kind]), name=kind)
