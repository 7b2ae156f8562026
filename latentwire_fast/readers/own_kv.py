"""A reader's own keys and values of parts of its prompts: what a deep prefix starts from, and
stands behind.

Shapes: L layers, 2 keys and values, H key/value heads, T positions, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from latentwire_fast.config.schema import Mode
from latentwire_fast.errors import ConfigError
from latentwire_fast.prompts.builder import Turn
from latentwire_fast.readers.reader import Reader


@torch.no_grad()
def head_keys_values(reader: Reader, mode: Mode) -> Tensor:
    """Keys and values `[L, 2, 1, H, T, D]` of what is before a latent in a prompt."""
    prompt = reader.prompts.build([Turn("")], context="", latent=mode)
    head = prompt.ids[: prompt.latent_at]
    # Where there is nothing before it, nothing of a token that stands for it.
    return keys_values(reader, head or [reader.prompts.eos_id])[:, :, :, :, : len(head)]


@torch.no_grad()
def keys_values_in_place(reader: Reader, mode: Mode, text: str, *, positions: int) -> Tensor:
    """Keys and values `[L, 2, 1, H, T, D]` of what is before a latent in a prompt, and of the first
    `positions` tokens of a text that stands in the latent's place. A shorter text is repeated.

    Raises:
        ConfigError: a text without tokens.
    """
    prompt = reader.prompts.build([Turn("")], context="", latent=mode)
    ids = reader.prompts.text_ids(f" {text}")
    if not ids:
        raise ConfigError(f"reader {reader.name!r} has no tokens for {text!r}; give another text")
    repeated = ids * -(-positions // len(ids))
    return keys_values(reader, [*prompt.ids[: prompt.latent_at], *repeated[:positions]])


@torch.no_grad()
def keys_values(reader: Reader, ids: Sequence[int]) -> Tensor:
    """Keys and values `[L, 2, 1, H, T, D]` of tokens at the start of a prompt."""
    return torch.stack([side[:, None] for side in _read(reader, ids)])


@torch.no_grad()
def text_keys_values(reader: Reader, context: str, *, slots: int, first: int) -> Tensor:
    """Keys and values `[L, 2, H, T, D]` of a context, fp32. Its keys are turned to where `slots`
    positions from `first` on would stand for it; not, where a reader's keys cannot be turned."""
    builder = reader.prompts
    ids = builder.build_context(context).ids
    start = builder.content_start + len(builder.label_ids)
    place_T = torch.arange(len(ids) - start, device=reader.device)
    by_1T = (first + place_T * slots // max(1, len(place_T)) - start - place_T)[None]
    try:
        turner = reader.turner
    except ConfigError:
        turner = None
    sides = []
    for number, side in enumerate(_read(reader, ids)):
        keys, values = side[:, :, start:].float()
        if turner is not None:
            keys = turner.turn(keys[None], layer=number, by_BT=by_1T, last=len(ids) - 1)[0]
        sides.append(torch.stack([keys, values]))
    return torch.stack(sides)


def _read(reader: Reader, ids: Sequence[int]) -> list[Tensor]:
    """Keys and values `[2, H, T, D]` of each layer, on the reader's device."""
    cache: Any = DynamicCache()  # without a configuration: windows drop no keys
    reader.backbone(
        input_ids=torch.tensor([[*ids]], device=reader.device),
        past_key_values=cache,
        use_cache=True,
    )
    layers = (torch.cat([layer.keys, layer.values]) for layer in cache.layers)
    return [layer.to(reader.device) for layer in layers]
