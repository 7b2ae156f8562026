"""A SQuAD v1.1 or v2.0 JSON file, or some of its articles: what a bare path of a file is."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from latentwire_fast.data.examples import Split
from latentwire_fast.data.sets.base import DataSet, DataSetConfig, Loaded
from latentwire_fast.data.squad import load_squad
from latentwire_fast.errors import DataError


class SquadFile(DataSet):
    """The questions of one file, which has no splits."""

    @dataclass(frozen=True)
    class Config(DataSetConfig):
        """`articles`: first and end of a slice of the articles in the order of their titles."""

        articles: tuple[int | None, int | None] | None = None

    config: Config

    def load(self, place: Path | None, *, split: Split, count: int | None, seed: int) -> Loaded:
        """Every question, shuffled.

        Raises:
            DataError: a missing or malformed file.
        """
        if place is None:
            raise DataError("a SQuAD file is not on the hub; give its path, or take hub:squad")
        articles = self.config.articles
        examples = load_squad(place, articles=None if articles is None else slice(*articles))
        return Loaded(random.Random(seed).sample(examples, len(examples)), is_of_split=False)
