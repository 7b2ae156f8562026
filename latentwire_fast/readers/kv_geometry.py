"""The shape and size of one reader's keys and values."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KVGeometry:
    """Shape and size of a reader's keys and values, for deep prefixes.

    Attributes:
        layers, heads, head_width: L, H and D of its key/value cache.
        rms: root mean square of its own keys and values per layer, what a new prefix starts with.
    """

    layers: int
    heads: int
    head_width: int
    rms: tuple[tuple[float, float], ...]
