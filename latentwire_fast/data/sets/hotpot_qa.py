"""HotpotQA (Yang et al. 2018)."""

from __future__ import annotations

from dataclasses import dataclass

from latentwire_fast.data.examples import Example
from latentwire_fast.data.sets.hub_set import HubConfig, HubSet
from latentwire_fast.data.sets.rows import (
    SENTENCES_PER_ITEM,
    Row,
    clip,
    distinct,
    first_items,
    records,
)


class HotpotQA(HubSet):
    """Questions that need two paragraphs out of ten."""

    @dataclass(frozen=True)
    class Config(HubConfig):
        """Where the rows are."""

        path: str = "hotpotqa/hotpot_qa"
        columns: tuple[str, ...] = ("id", "question", "answer", "supporting_facts", "context")
        subset: str | None = "distractor"

    def convert(self, row: Row) -> Example | None:
        """The first sentences of a few paragraphs, those with supporting facts before any other."""
        paragraphs = records(row["context"])
        supporting = {fact["title"] for fact in records(row["supporting_facts"])}
        texts = [
            f"{p['title']}: " + "".join(p["sentences"][:SENTENCES_PER_ITEM]).strip()
            for p in paragraphs
        ]
        preferred = (i for i, p in enumerate(paragraphs) if p["title"] in supporting)
        context = clip("\n".join(first_items(texts, preferred=preferred)))
        answers = distinct([row["answer"] or ""])
        return Example(row["id"], context, row["question"].strip(), answers) if answers else None
