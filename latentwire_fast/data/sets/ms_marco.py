"""MS MARCO (Bajaj et al. 2016)."""

from __future__ import annotations

from dataclasses import dataclass

from latentwire_fast.data.examples import Example, Passage, Ranking
from latentwire_fast.data.row_files import RowFile
from latentwire_fast.data.sets.hub_set import HubConfig, HubSet
from latentwire_fast.data.sets.rows import (
    Row,
    RowError,
    answer_texts,
    clip,
    first_items,
    identifier,
    records_of,
    text,
    whole,
)


class MSMarco(HubSet):
    """Search queries with passages of web pages.

    Its own files are JSON lines (v1.1) or an object of columns (v2.1).
    """

    @dataclass(frozen=True)
    class Config(HubConfig):
        """Where the rows are."""

        path: str = "microsoft/ms_marco"
        columns: tuple[str, ...] = ("answers", "passages", "query", "query_id")
        subset: str | None = "v2.1"
        is_streamed: bool = True

    files = "dev_v2.1.json.gz (ranked hits with judgements: trec=FILE)"

    def from_file(self, row: Row, file: RowFile) -> Row:
        """As it is; hits of a ranker are another set."""
        if "hits" in row or "candidates" in row:
            raise RowError("these are the hits of a ranker, without answers: give trec=FILE")
        return row

    def convert(self, row: Row) -> Example | None:
        """A few passages, the one that the annotator used before any other."""
        answers = tuple(a for a in answer_texts(row) if a != "No Answer Present.")
        if not answers:
            return None
        records = records_of(row, "passages")
        found = [text(p, "passage_text") for p in records]
        selected = [i for i, p in enumerate(records) if whole(p, "is_selected")]
        query = identifier(row, "query_id")
        names = [f"{query}-{i}" for i in range(len(found))]
        ranking = Ranking(
            tuple(Passage(name, passage) for name, passage in zip(names, found, strict=True)),
            tuple((name, int(i in selected)) for i, name in enumerate(names)),
        )
        context = clip("\n".join(first_items(found, preferred=selected)))
        return Example(query, context, text(row, "query"), answers, ranking=ranking)
