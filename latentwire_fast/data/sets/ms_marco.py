"""MS MARCO (Bajaj et al. 2016)."""

from __future__ import annotations

from dataclasses import dataclass

from latentwire_fast.data.examples import Example
from latentwire_fast.data.sets.hub_set import HubConfig, HubSet
from latentwire_fast.data.sets.rows import Row, clip, distinct, first_items, records


class MSMarco(HubSet):
    """Search queries with passages of web pages."""

    @dataclass(frozen=True)
    class Config(HubConfig):
        """Where the rows are."""

        path: str = "microsoft/ms_marco"
        columns: tuple[str, ...] = ("answers", "passages", "query", "query_id")
        subset: str | None = "v2.1"
        is_streamed: bool = True

    def convert(self, row: Row) -> Example | None:
        """A few passages, the one that the annotator used before any other."""
        passages = records(row["passages"])
        answers = distinct(a for a in row["answers"] if a != "No Answer Present.")
        if not answers:
            return None
        preferred = (i for i, p in enumerate(passages) if p["is_selected"])
        texts = first_items([p["passage_text"].strip() for p in passages], preferred=preferred)
        return Example(str(row["query_id"]), clip("\n".join(texts)), row["query"].strip(), answers)
