"""Plain text: paragraphs without questions, for objectives that need none."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from latentwire_fast.config.base import require
from latentwire_fast.data.examples import Example, Split
from latentwire_fast.data.sets.base import DataSet, DataSetConfig, Loaded
from latentwire_fast.errors import DataError
from latentwire_fast.files.text import read_text

HARD_WRAPPED = 200  # characters: a file without a longer line breaks its paragraphs into lines
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


class Text(DataSet):
    """The paragraphs of a text file (.txt, .txt.xz, .txt.gz).

    A paragraph is a line, or in a file of short lines what stands between two empty ones. Too long
    ones are cut behind a sentence; too short ones, such as headings, are left out.
    """

    @dataclass(frozen=True)
    class Config(DataSetConfig):
        """`shortest`, `longest`: words of a paragraph."""

        shortest: int = 40
        longest: int = 150

        def __post_init__(self) -> None:
            super().__post_init__()
            require(
                1 <= self.shortest <= self.longest,
                f"shortest={self.shortest}, longest={self.longest}, expected 1 or more, and no "
                "more than the longest",
            )

    config: Config
    has_questions = False

    def load(self, place: Path | None, *, split: Split, count: int | None, seed: int) -> Loaded:
        """Every paragraph once, shuffled; their questions and answers are empty.

        Raises:
            DataError: a missing or unreadable file, or one without a paragraph long enough.
        """
        if place is None:
            raise DataError("a text file is not on the hub; give its path as text=FILE")
        found = dict.fromkeys(self._paragraphs(read_text(place)))
        if not found:
            raise DataError(
                f"{place}: no paragraph of {self.config.shortest} words or more; give a file with "
                "longer ones"
            )
        examples = [
            Example(f"paragraph-{number}", context=text, question="", answers=())
            for number, text in enumerate(found)
        ]
        return Loaded(random.Random(seed).sample(examples, len(examples)), is_of_split=False)

    def _paragraphs(self, text: str) -> Iterator[str]:
        lines = text.splitlines()
        if max(map(len, lines)) <= HARD_WRAPPED:
            lines = re.split(r"\n\s*\n", text)
        for line in lines:
            for piece in _cut(line, self.config.longest):
                if len(piece.split()) >= self.config.shortest:
                    yield piece


def _cut(line: str, longest: int) -> Iterator[str]:
    """A line in pieces of at most `longest` words, cut behind sentences where there are any."""
    piece: list[str] = []
    for sentence in _SENTENCE_END.split(" ".join(line.split())):
        words = sentence.split()
        if piece and len(piece) + len(words) > longest:
            yield " ".join(piece)
            piece = []
        while len(words) > longest:  # one sentence, or a list
            yield " ".join(words[:longest])
            words = words[longest:]
        piece += words
    if piece:
        yield " ".join(piece)
