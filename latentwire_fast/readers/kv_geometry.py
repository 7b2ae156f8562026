"""The shape and size of one reader's keys and values, as its own cache shows them.

Configurations do not tell: families name the number of key/value heads in different ways or not at
all, and some have an entry that they do not use.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from latentwire_fast.errors import ConfigError
from latentwire_fast.readers.embeddings import input_embedding


@dataclass(frozen=True)
class KVGeometry:
    """Shape and size of a reader's keys and values, for deep prefixes.

    Attributes:
        layers, heads, head_width: L, H and D of its key/value cache; all 0 for a reader that takes
            no deep prefix.
        rms: root mean square of its own keys and values per layer, what a new prefix starts with.
    """

    layers: int
    heads: int
    head_width: int
    rms: tuple[tuple[float, float], ...]

    @classmethod
    def none(cls) -> KVGeometry:
        """Of a reader that takes no deep prefix."""
        return cls(0, 0, 0, ())

    @classmethod
    def of_cache(cls, cache: Cache, *, layers: int) -> KVGeometry:
        """Of the cache of a reader with so many layers that has read something.

        Raises:
            ConfigError: one tensor cannot hold what these layers keep; the message is a reason
                why, to stand behind a colon.
        """
        if len(cache.layers) != layers:
            raise ConfigError(
                f"{layers} layers share the keys and values of {len(cache.layers)} among them"
            )
        sides = []
        for number, layer in enumerate(cache.layers):
            keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
            if type(layer) is not DynamicLayer or keys is None or values is None:
                raise ConfigError(
                    f"layer {number} keeps its past in a {type(layer).__name__}, not in keys and "
                    "values"
                )
            sides.append((keys, values))
        shapes = [(k.shape[1], k.shape[3], v.shape[1], v.shape[3]) for k, v in sides]
        heads, width, *of_values = shapes[0]
        if (heads, width) != tuple(of_values):
            raise ConfigError(
                f"its keys are {heads} heads of width {width}, its values "
                f"{of_values[0]} of width {of_values[1]}"
            )
        for number, shape in enumerate(shapes):
            if shape != shapes[0]:
                raise ConfigError(
                    f"layer 0 has {heads} key/value heads of width {width}, layer {number} "
                    f"{shape[0]} of width {shape[1]}"
                )
        rms = tuple((_rms(keys), _rms(values)) for keys, values in sides)
        return cls(layers, heads, width, rms)


def _rms(part: torch.Tensor) -> float:
    return part.float().pow(2).mean().sqrt().item()


@torch.no_grad()
def measured_geometry(model: PreTrainedModel, cache: Cache, *, layers: int) -> KVGeometry:
    """`KVGeometry.of_cache` after a model has read one token into an empty cache."""
    device = input_embedding(model).weight.device
    ids_11 = torch.zeros(1, 1, dtype=torch.long, device=device)
    model(input_ids=ids_11, past_key_values=cache, use_cache=True)
    return KVGeometry.of_cache(cache, layers=layers)
