"""SQuAD v1.1 (Rajpurkar et al. 2016)."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from latentwire_fast.data.examples import Example, Split
from latentwire_fast.data.row_files import has_known_name
from latentwire_fast.data.sets.base import Loaded
from latentwire_fast.data.sets.hub_set import HubConfig, HubSet
from latentwire_fast.data.sets.rows import Row, answer_texts, identifier, text
from latentwire_fast.data.squad import NO_ANSWER, is_squad_json, load_squad


class Squad(HubSet):
    """Questions on passages of Wikipedia. Its own JSON file may be given too."""

    @dataclass(frozen=True)
    class Config(HubConfig):
        """Where the rows are."""

        path: str = "rajpurkar/squad"
        columns: tuple[str, ...] = ("id", "context", "question", "answers")

    files = "train-v1.1.json and dev-v1.1.json"

    def load(self, place: Path | None, *, split: Split, count: int | None, seed: int) -> Loaded:
        """Rows, or every question of a SQuAD file, shuffled.

        Raises:
            DataError: as of every set of rows.
        """
        if place is None or not (place.is_file() and has_known_name(place)):
            return super().load(place, split=split, count=count, seed=seed)
        if not is_squad_json(place):
            return super().load(place, split=split, count=count, seed=seed)
        examples = load_squad(place)
        return Loaded(random.Random(seed).sample(examples, len(examples)), is_of_split=False)

    def convert(self, row: Row) -> Example:
        """All distinct answers; `NO_ANSWER` where there is none."""
        return Example(
            id=identifier(row),
            context=text(row, "context", strip=False),
            question=text(row, "question"),
            answers=answer_texts(row) or (NO_ANSWER,),
        )
