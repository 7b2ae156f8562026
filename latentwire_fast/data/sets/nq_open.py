"""The open form of Natural Questions (Lee et al. 2019): questions without a page."""

from __future__ import annotations

from dataclasses import dataclass

from latentwire_fast.data.examples import Example
from latentwire_fast.data.sets.hub_set import HubConfig, HubSet
from latentwire_fast.data.sets.rows import Row, answer_texts, digest, text


class NQOpen(HubSet):
    """Search queries and short answers. Their context is empty: `mode=context` cannot use them."""

    @dataclass(frozen=True)
    class Config(HubConfig):
        """Where the rows are."""

        path: str = "google-research-datasets/nq_open"
        columns: tuple[str, ...] = ("question", "answer")

    files = "NQ-open.dev.jsonl"

    def convert(self, row: Row) -> Example:
        """The question and every answer."""
        question = text(row, "question")
        return Example(digest(question), "", question, answer_texts(row, "answer"))
