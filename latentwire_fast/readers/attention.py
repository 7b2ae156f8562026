"""Attention in the place of a model's own, above all causal attention without a mask.

That is for forward passes that are captured in a graph or compiled:
transformers leaves the mask out where `is_causal` says the same, but not under a CUDA graph capture
(5.17) nor under `torch.compile`: there a mask `[B, 1, T, T]` is made, with it the flash kernels are
out of reach, and grouped key/value heads are repeated in memory. Its flash_attention_2 path reads
position ids on the host, which a capture forbids. A batch that is padded on the right needs no
mask, and both kinds of reader then run this function: the same kernels, told `causal`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.modeling_utils import AttentionInterface

from latentwire_fast.errors import ConfigError

MASK_FREE = "latentwire_mask_free"
_REPLACED = ("sdpa", "flash_attention_2")
# What transformers' models may pass on to attention that changes its result.
_UNKNOWN = ("softcap", "s_aux")


def causal_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of the last T of N positions: position i of them sees N - T + i + 1 keys, or the
    last of these where the layer has a window.

    Args:
        query: `[B, heads, T, d_head]`; key, value: `[B, key/value heads, N, d_head]`, N >= T.
        attention_mask: none; transformers makes none for an implementation it has no mask for.

    Returns:
        `[B, T, heads, d_head]`, and no attention weights.

    Raises:
        ConfigError: the model asks for more than causal attention in a window.
    """
    assert attention_mask is None
    asked = [name for name in _UNKNOWN if kwargs.get(name) is not None]
    if asked:
        raise ConfigError(
            f"a {type(module).__name__} wants attention with {asked[0]}, and only plain causal "
            "attention can be put in the place of a model's own"
        )
    queries, keys = query.shape[2], key.shape[2]
    causal: dict[str, Any] = {"is_causal": True}
    window = kwargs.get("sliding_window")
    if window is not None and window < keys:
        seen_TN = ~_hidden(queries, keys, window=window, device=query.device)
        causal = {"attn_mask": seen_TN}
    elif queries != keys:  # torch's own `is_causal` would align the first positions
        causal = {"attn_mask": causal_lower_right(queries, keys)}
    out = scaled_dot_product_attention(
        *(query, key, value), **causal, scale=scaling, enable_gqa=key.shape[1] != query.shape[1]
    )
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(MASK_FREE, causal_attention)


@contextmanager
def own_attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Inside the block, a model runs the registered attention of that name."""
    config = model.config.get_text_config(decoder=True)
    before, config._attn_implementation = config._attn_implementation, name
    try:
        yield
    finally:
        config._attn_implementation = before


@contextmanager
def mask_free(model: PreTrainedModel) -> Iterator[bool]:
    """Inside the block, a model that uses torch's or flash attention runs `causal_attention`.

    Yields:
        Whether it does. A model with eager attention is left as it is, and needs its mask.
    """
    own = model.config.get_text_config(decoder=True)._attn_implementation
    replaces = own in _REPLACED
    with own_attention(model, MASK_FREE if replaces else own):
        yield replaces


def causal_mask(queries: int, keys: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Causal mask `[1, 1, T, N]`, added to eager attention's scores: 0 or the dtype's minimum."""
    hidden = _hidden(queries, keys, window=None, device=device)
    mask = torch.zeros(1, 1, queries, keys, dtype=dtype, device=device)
    return mask.masked_fill(hidden, torch.finfo(dtype).min)


def _hidden(queries: int, keys: int, *, window: int | None, device: torch.device) -> Tensor:
    """What the last T of N positions do not see `[T, N]`: what comes later, and what has left the
    window of the last so many positions."""
    ones = torch.ones(queries, keys, dtype=torch.bool, device=device)
    later = ones.triu(keys - queries + 1)
    return later if window is None else later | ones.tril(keys - queries - window)
