"""The card of a reader: the facts that a model stores of each of its readers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from latentwire_fast.readers.kv_cache import decoder_layers
from latentwire_fast.readers.kv_geometry import KVGeometry
from latentwire_fast.readers.reader import Reader


@dataclass(frozen=True)
class ReaderCard:
    """Facts that an adapter needs of its reader, and the fingerprint that it knows it by.

    Attributes:
        layers: how many decoder layers it has; 0 in models of an earlier version, where no part
            needed to know.
    """

    d_model: int
    embedding_rms: float
    fingerprint: str
    kv: KVGeometry
    source: str = ""
    layers: int = 0

    @classmethod
    def of(cls, reader: Reader) -> ReaderCard:
        """The card of a loaded reader."""
        return cls(
            reader.d_model,
            reader.embedding_rms,
            reader.fingerprint,
            KVGeometry.none() if reader.abilities.deep else reader.kv_geometry,
            reader.source,
            len(decoder_layers(reader.model)),
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ReaderCard:
        """The inverse of `dataclasses.asdict` and JSON."""
        kv = {**data["kv"], "rms": tuple(map(tuple, data["kv"]["rms"]))}
        return cls(**{**data, "kv": KVGeometry(**kv)})
