"""HotpotQA (Yang et al. 2018), distractor and fullwiki."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from latentwire_fast.data.examples import Example, Passage, Ranking
from latentwire_fast.data.row_files import RowFile
from latentwire_fast.data.sets.hub_set import HubConfig, HubSet
from latentwire_fast.data.sets.rows import (
    SENTENCES_PER_ITEM,
    Row,
    RowError,
    cell,
    clip,
    distinct,
    first_items,
    identifier,
    items,
    records_of,
    shown,
    text,
    texts,
)


class HotpotQA(HubSet):
    """Questions that need two paragraphs out of ten.

    Its own files (a JSON list, or one object per line) have `_id`, and pairs in the place of the
    hub's records; what stands behind a pair's second item is not read.
    """

    @dataclass(frozen=True)
    class Config(HubConfig):
        """Where the rows are."""

        path: str = "hotpotqa/hotpot_qa"
        columns: tuple[str, ...] = ("id", "question", "answer", "supporting_facts", "context")
        subset: str | None = "distractor"

    files = "hotpot_dev_distractor_v1.json or hotpot_dev_fullwiki_v1.json"

    def from_file(self, row: Row, file: RowFile) -> Row:
        """Pairs become records."""
        changed = dict(row)
        if "_id" in row:
            changed["id"] = cell(row, "_id")
        for column, second in ("supporting_facts", "sent_id"), ("context", "sentences"):
            value = row.get(column)
            if isinstance(value, list) and any(isinstance(item, list) for item in value):
                changed[column] = [_pair(item, column, i, second) for i, item in enumerate(value)]
        return changed

    def convert(self, row: Row) -> Example | None:
        """The first sentences of a few paragraphs, those with supporting facts before any other."""
        answers = distinct([(cell(row, "answer") and text(row, "answer")) or ""])
        if not answers:
            return None
        paragraphs = records_of(row, "context")
        supporting = {text(fact, "title") for fact in records_of(row, "supporting_facts")}
        titles = [text(p, "title", strip=False) for p in paragraphs]
        sentences = [texts(p, "sentences") for p in paragraphs]
        parts = [
            f"{title}: " + "".join(of_title[:SENTENCES_PER_ITEM]).strip()
            for title, of_title in zip(titles, sentences, strict=True)
        ]
        preferred = (i for i, title in enumerate(titles) if title.strip() in supporting)
        passages = tuple(
            Passage(title, "".join(of_title).strip())
            for title, of_title in zip(titles, sentences, strict=True)
        )
        return Example(
            identifier(row),
            clip("\n".join(first_items(parts, preferred=preferred))),
            text(row, "question"),
            answers,
            ranking=Ranking(passages, tuple((title, 1) for title in sorted(supporting))),
            subject=str(row.get("type") or ""),
        )


def _pair(item: Any, column: str, number: int, second: str) -> dict[str, Any]:
    if not (isinstance(item, list) and len(item) >= 2):
        raise RowError(f"{column!r}, item {number} is {shown(item)}, expected a pair")
    if second == "sentences":
        items({second: item[1]}, second)
    return {"title": item[0], second: item[1]}
