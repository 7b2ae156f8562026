"""Prompts that were read one by one, as one result."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers.cache_utils import Cache

from latentwire_fast.errors import ConfigError
from latentwire_fast.readers.decoding import DecodeOptions
from latentwire_fast.readers.reader import Reader
from latentwire_fast.serving.prefilled import Prefilled, row_numbers


class PrefilledApart(Prefilled):
    """The prefills of a reader that cannot decode several lengths in one batch.

    Args:
        parts: one prefill per row.
    """

    def __init__(self, reader: Reader, parts: Sequence[Prefilled]) -> None:
        self._reader = reader
        self._parts = parts
        self.logits_BV = torch.cat([part.logits_BV for part in parts])
        self.positions = max(part.positions for part in parts)

    @property
    def cache(self) -> Cache:
        """There is none of all rows.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            f"reader {self._reader.name!r} has read these prompts one by one, each into a cache of "
            "its own; prefill one prompt to get its cache"
        )

    def generate(
        self, options: DecodeOptions | None = None, *, numbers: Sequence[int] | None = None
    ) -> list[list[int]]:
        """As `Prefilled.generate`, row by row."""
        numbers = row_numbers(numbers, rows=len(self._parts))
        rows = zip(self._parts, numbers, strict=True)
        return [part.generate(options, numbers=[number])[0] for part, number in rows]
