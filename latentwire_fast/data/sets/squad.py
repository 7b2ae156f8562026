"""SQuAD v1.1 (Rajpurkar et al. 2016)."""

from __future__ import annotations

from dataclasses import dataclass

from latentwire_fast.data.examples import Example
from latentwire_fast.data.sets.hub_set import HubConfig, HubSet
from latentwire_fast.data.sets.rows import Row, distinct, records
from latentwire_fast.data.squad import NO_ANSWER


class Squad(HubSet):
    """Questions on passages of Wikipedia."""

    @dataclass(frozen=True)
    class Config(HubConfig):
        """Where the rows are."""

        path: str = "rajpurkar/squad"
        columns: tuple[str, ...] = ("id", "context", "question", "answers")

    def convert(self, row: Row) -> Example:
        """All distinct answers; `NO_ANSWER` where there is none."""
        answers = distinct(answer["text"] for answer in records(row["answers"]))
        return Example(
            id=row["id"],
            context=row["context"],
            question=row["question"].strip(),
            answers=answers or (NO_ANSWER,),
        )
