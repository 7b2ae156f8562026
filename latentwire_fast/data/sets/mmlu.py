"""MMLU (Hendrycks et al. 2021)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from latentwire_fast.data.examples import Choices, Example
from latentwire_fast.data.row_files import RowFile
from latentwire_fast.data.sets.hub_set import HubConfig, HubSet
from latentwire_fast.data.sets.rows import (
    LETTERS,
    Row,
    RowError,
    choice_example,
    choice_number,
    digest,
    text,
    texts,
)

_SPLIT = re.compile(r"_(dev|val|test|train)$")


class MMLU(HubSet):
    """Multiple-choice questions of 57 subjects.

    Its CSV files have a subject in their name (`anatomy_test.csv`). The official ones have no
    header and answers A to D; others have a header (`question`, then `A`... or `choice0`..., and
    `answer`), or answers 0 to 3.
    """

    @dataclass(frozen=True)
    class Config(HubConfig):
        """Where the rows are."""

        path: str = "cais/mmlu"
        columns: tuple[str, ...] = ("question", "subject", "choices", "answer")
        subset: str | None = "all"
        train: str = "auxiliary_train"
        heldout: str = "test"

    files = "SUBJECT_test.csv, or data.tar with all of them"
    headerless = ("question", "A", "B", "C", "D", "answer")
    keeps_repeats = True  # a few questions are in it twice, and count twice
    metric = "accuracy"

    def from_file(self, row: Row, file: RowFile) -> Row:
        """Choices in columns of their own become a list; the file's name is the subject."""
        if "subject" not in row:
            row = {**row, "subject": _SPLIT.sub("", file.stem)}
        if "choices" in row:
            return row
        names = {str(key).lower(): key for key in row}
        for columns in ([f"choice{i}" for i in range(10)], [*LETTERS.lower()]):
            found = [names[column] for column in columns if column in names]
            if len(found) > 1:
                return {**row, "choices": [text(row, key, strip=False) for key in found]}
        raise RowError(f"no 'choices', 'choice0'... or 'A'... (found: {', '.join(map(str, row))})")

    def convert(self, row: Row) -> Example:
        """The choices as context, the correct one's text as answer."""
        question, subject = text(row, "question"), text(row, "subject")
        choices = texts(row, "choices")
        gold = choice_number(row, "answer", len(choices))
        return choice_example(
            digest(subject, question, *choices),
            question,
            choices,
            choices=Choices(tuple(choices), (gold,), gold),
            subject=subject,
        )
