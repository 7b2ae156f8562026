"""What a reader may be used for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class ReaderAbilities:
    """One entry for each use: the reason why it cannot be, or nothing where it can.

    Attributes:
        reads: the reader at all: what it reads in a batch, and what it decodes, is what it reads
            and says alone.
        soft: soft tokens in the place of input embeddings.
        deep: a deep prefix in its cache.
        together: prompts of several lengths decoded in one batch. Where they cannot be, a receiver
            reads one after the other.
        left: padding on the left.
    """

    reads: str = ""
    soft: str = ""
    deep: str = ""
    together: str = ""
    left: str = ""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ReaderAbilities:
        """The inverse of `dataclasses.asdict` and JSON.

        Raises:
            ValueError: something else.
        """
        names = [field.name for field in fields(cls)]
        if sorted(data) != sorted(names) or not all(isinstance(v, str) for v in data.values()):
            raise ValueError(f"expected texts {names}, found {sorted(data)}")
        return cls(**data)
