"""SubjQA (Bjerva et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass

from latentwire_fast.data.examples import Example
from latentwire_fast.data.sets.hub_set import HubConfig, HubSet
from latentwire_fast.data.sets.rows import Row, digest, text
from latentwire_fast.data.squad import NO_ANSWER

_NOT_FOUND = "ANSWERNOTFOUND"


class SubjQA(HubSet):
    """Questions on reviews; a good half has no answer.

    Its files are CSV, a folder per domain. Each row is one annotator's answer, so a question on a
    review may stand there several times.
    """

    @dataclass(frozen=True)
    class Config(HubConfig):
        """Where the rows are: in files alone."""

        path: str = ""
        columns: tuple[str, ...] = ("q_review_id", "question", "review", "human_ans_spans")

    files = "SubjQA/DOMAIN/splits/dev.csv"
    keeps_repeats = True

    def convert(self, row: Row) -> Example:
        """The review without the word at its end that stands for "no answer"."""
        review, answer = text(row, "review"), text(row, "human_ans_spans")
        return Example(
            f"{text(row, 'q_review_id')}-{digest(answer)[:8]}",
            review.removesuffix(_NOT_FOUND).rstrip(),
            text(row, "question"),
            (NO_ANSWER if _NOT_FOUND in answer else answer,),
            subject=str(row.get("domain") or ""),
        )
