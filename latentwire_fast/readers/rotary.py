"""Keys and queries at other positions than they were computed at.

A rotary reader's keys depend on their position by a rotation alone, so a key can be turned to
another place. Families differ in how: whole heads or a part of them, halves or pairs of channels,
another base in some layers, no rotation at all in others. `Turner` takes the model's own rotary
module and function, and tries them out on a few tokens when it is made: a reader whose keys it
cannot turn is refused.

Shapes: B texts, H heads, T positions, D head width.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from latentwire_fast.errors import ConfigError
from latentwire_fast.readers.kv_cache import decoder_layers

_TOKENS, _SHIFT = 6, 9  # of the trial
# Relative error of a turned key: rounding of a layer's inputs, and what another form comes to.
_EXACT, _ROUNDED = 1e-3, 5e-2


class Turner:
    """Turns keys and queries of one model by a number of positions.

    Args:
        model: a causal LM. It runs twice over a few tokens.
        name: of the reader, for messages.

    Raises:
        ConfigError: its keys at one position cannot be had from those at another.
    """

    def __init__(self, model: PreTrainedModel, *, name: str) -> None:
        decoder = model.get_decoder()
        self._rotary: nn.Module | None = getattr(decoder, "rotary_emb", None)
        layers = decoder_layers(model)
        types = getattr(model.config.get_text_config(decoder=True), "layer_types", None)
        per_type = self._rotary is not None and "layer_type" in _parameters(self._rotary.forward)
        self._types = [types[i] if per_type and types else None for i in range(len(layers))]
        self._widths = [_rotary_width(layer) for layer in layers]
        self._apply: Callable[..., Any] | None = getattr(
            sys.modules[type(layers[0]).__module__], "apply_rotary_pos_emb", None
        )
        self._rotates = self._try_out(model, name)

    def turn(self, states_BHTD: Tensor, *, layer: int, by_BT: Tensor, last: int = 0) -> Tensor:
        """Keys or queries `[B, H, T, D]` of a layer, `by_BT` positions further on, fp32.

        Args:
            by_BT: int64, may be negative; `[1, T]` or `[B, T]`.
            last: the highest position of the pass that they are of. Some models take other
                frequencies for long texts, and decide by it.
        """
        states_BHTD = states_BHTD.float()
        return (
            self._turned(states_BHTD, layer, by_BT, last) if self._rotates[layer] else states_BHTD
        )

    def _turned(self, states_BHTD: Tensor, layer: int, by_BT: Tensor, last: int) -> Tensor:
        assert self._rotary is not None
        assert self._apply is not None
        kind = self._types[layer]
        options = {} if kind is None else {"layer_type": kind}
        places = torch.cat([by_BT, torch.full_like(by_BT[:, :1], last)], 1)
        cos, sin = (
            part[:, :-1].float()
            for part in self._rotary(states_BHTD.new_zeros(1), places, **options)
        )
        size = (cos.square() + sin.square()).sqrt()  # some models scale what they rotate
        width = self._widths[layer] or states_BHTD.shape[-1]
        turned, rest = states_BHTD[..., :width], states_BHTD[..., width:]
        turned, _ = self._apply(turned, turned, cos / size, sin / size)
        return torch.cat([turned, rest], -1)

    @torch.no_grad()
    def _try_out(self, model: PreTrainedModel, name: str) -> list[bool]:
        """Whether each layer rotates its keys."""
        weight = cast(nn.Embedding, model.get_input_embeddings()).weight
        ids = torch.arange(_TOKENS, device=weight.device)[None] % len(weight)
        first, second = (_keys(model, ids, start) for start in (0, _SHIFT))
        limit = _EXACT if model.dtype == torch.float32 else _ROUNDED
        can_turn = self._rotary is not None and self._apply is not None
        by = torch.full_like(ids, _SHIFT)
        rotates = []
        for layer, (before, after) in enumerate(zip(first, second, strict=True)):
            moves = _error(before, after) > limit
            if moves:
                turned = self._turned(before, layer, by.to(before.device), 0) if can_turn else None
                if turned is None or turned.shape != after.shape or _error(turned, after) > limit:
                    raise ConfigError(
                        f"reader {name!r} ({model.config.model_type}): the keys of its layer "
                        f"{layer} at one position cannot be computed from those at another; train "
                        "it with objectives that read answers ('answer', 'kd') instead of 'kv' or "
                        "'attention'"
                    )
            rotates.append(moves)
        return rotates


def _parameters(function: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(function).parameters)


def _rotary_width(layer: nn.Module) -> int | None:
    """How many channels of a head its attention rotates, where it cuts them off itself."""
    widths = (getattr(module, "rotary_ndims", None) for module in layer.modules())
    return next((width for width in widths if width is not None), None)


def _keys(model: PreTrainedModel, ids: Tensor, start: int) -> list[Tensor]:
    """The keys of each layer, fp32, of tokens at the positions from `start` on."""
    positions = start + torch.arange(ids.shape[1], device=ids.device)[None]
    cache: Any = DynamicCache()  # without a configuration: windows drop no keys
    model.base_model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)
    return [layer.keys.float() for layer in cache.layers]


def _error(found: Tensor, wanted: Tensor) -> float:
    """The norm of the difference, relative to that of what is wanted."""
    return ((found - wanted).norm() / wanted.norm().clamp(min=1e-12)).item()
