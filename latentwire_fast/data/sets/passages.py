"""Passages with ids of their own, without questions: a corpus to encode, or to train on."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentwire_fast.data.examples import Example, Split
from latentwire_fast.data.sets.base import DataSet, DataSetConfig, Loaded
from latentwire_fast.errors import DataError
from latentwire_fast.files.text import read_text

ID_KEYS = ("id", "_id", "docid")
TEXT_KEYS = ("text", "contents", "passage", "content")
PACKED = (".xz", ".gz")


class Passages(DataSet):
    """A file with one passage on each line (packed as .xz or .gz, too).

    JSON lines: objects with an id (`id`, `_id` or `docid`) and a text (`text`, `contents`,
    `passage` or `content`), and maybe a `title`, which comes before the text: `TITLE: TEXT`. In a
    .tsv file: the id, a tab, and the text.
    """

    @dataclass(frozen=True)
    class Config(DataSetConfig):
        """Nothing to set."""

    has_questions = False

    def load(self, place: Path | None, *, split: Split, count: int | None, seed: int) -> Loaded:
        """Every passage, shuffled; questions and answers are empty.

        Raises:
            DataError: a missing or unreadable file, or a line of another form.
        """
        if place is None:
            raise DataError("a file of passages is not on the hub; give its path as passages=FILE")
        suffixes = [suffix for suffix in place.suffixes if suffix not in PACKED]
        is_table = bool(suffixes) and suffixes[-1] == ".tsv"
        examples = [*_examples(place, is_table=is_table)]
        return Loaded(random.Random(seed).sample(examples, len(examples)), is_of_split=False)


def _examples(path: Path, *, is_table: bool) -> Iterator[Example]:
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            identifier, text = _columns(line) if is_table else _record(json.loads(line))
            if not (identifier and text):
                raise ValueError("an empty id or text")
        except (ValueError, RecursionError) as error:
            wanted = (
                "an id, a tab and a text"
                if is_table
                else 'a JSON object with an id and a text, such as {"id": "7", "text": "..."}'
            )
            raise DataError(f"{path}, line {number}: {error}; expected {wanted}") from None
        yield Example(identifier, context=text, question="", answers=())


def _columns(line: str) -> tuple[str, str]:
    identifier, tab, text = line.partition("\t")
    if not tab:
        raise ValueError("there is no tab")
    return identifier.strip(), text.strip()


def _record(record: Any) -> tuple[str, str]:
    if not isinstance(record, dict):
        raise ValueError(f"{type(record).__name__} is no object")
    identifier, text = _first(record, ID_KEYS), _first(record, TEXT_KEYS)
    if not isinstance(identifier, str | int) or isinstance(identifier, bool):
        raise ValueError(f"no id among the keys {[*record]}")
    if not isinstance(text, str):
        raise ValueError(f"no text among the keys {[*record]}")
    title = record.get("title")
    text = text.strip()
    whole = f"{title.strip()}: {text}" if isinstance(title, str) and title.strip() else text
    return str(identifier), whole if text else ""


def _first(record: dict[str, Any], keys: tuple[str, ...]) -> Any:
    return next((record[key] for key in keys if key in record), None)
