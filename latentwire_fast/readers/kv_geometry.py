"""The shape and size of one reader's keys and values."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KVGeometry:
    """What a deep prefix must know of a reader.

    Attributes:
        layers, heads, head_width: L, H and D of its key/value cache.
        rms: root mean square of its own keys and values per layer, what a new prefix starts with.
    """

    layers: int
    heads: int
    head_width: int
    rms: tuple[tuple[float, float], ...]
