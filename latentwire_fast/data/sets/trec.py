"""Passages that a ranker found for queries, with the judgements of TREC."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from latentwire_fast.data.examples import Example, Passage, Ranking, Split
from latentwire_fast.data.qrels import Qrels, qrels_beside
from latentwire_fast.data.row_files import FileRow, row_files, rows_of
from latentwire_fast.data.sets.base import DataSet, DataSetConfig, Loaded
from latentwire_fast.data.sets.rows import (
    ITEMS,
    RowError,
    cell,
    clip,
    identifier,
    items,
    shown,
    text,
)
from latentwire_fast.errors import DataError


class Trec(DataSet):
    """Queries with the passages that a ranker found, and their grades.

    A file has a row per query, as rank_llm writes them: `query` (a text, or an object of `text`
    and `qid`) and `hits` or `candidates`. Grades come from the files `qrels*` beside it, whose
    lines are `QUERY 0 PASSAGE GRADE`. There are no answers, so no run is scored on it by F1.
    """

    @dataclass(frozen=True)
    class Config(DataSetConfig):
        """Nothing to set."""

    has_questions = False

    def load(self, place: Path | None, *, split: Split, count: int | None, seed: int) -> Loaded:
        """Every query; its context is the first passages.

        Raises:
            DataError: no path, a malformed file, or no judgements of these queries.
        """
        if place is None:
            raise DataError("trec is not on the hub; give a file of ranked passages as trec=FILE")
        rows = [
            row for file in row_files(place) if not is_qrels(file.stem) for row in rows_of(file)
        ]
        found = [_converted(row) for row in rows]
        if not found:
            raise DataError(f"{place}: holds no queries")
        qrels = qrels_beside(place, {example.id for example in found})
        graded = [_with_grades(example, qrels) for example in found]
        order = np.random.default_rng(seed).permutation(len(graded))
        return Loaded([graded[i] for i in order], is_of_split=False)


def is_qrels(stem: str) -> bool:
    """Whether a file's name says that it holds judgements."""
    return stem.startswith("qrels")


def _converted(row: FileRow) -> Example:
    value = row.read()
    try:
        return _example(value)
    except RowError as error:
        raise DataError(
            f"{row.where}: {error}; expected a query with its 'hits', as rank_llm writes them"
        ) from None


def _example(row: Mapping[str, Any]) -> Example:
    hits = items(row, "hits" if "hits" in row or "candidates" not in row else "candidates")
    if not hits:
        raise RowError("'hits' is empty")
    passages = []
    for i, hit in enumerate(hits):
        try:
            passages.append(_passage(hit))
        except RowError as error:
            raise RowError(f"hit {i}: {error}") from None
    names = [passage.id for passage in passages]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise RowError(f"'docid' {twice!r} occurs twice")
    query = cell(row, "query")
    if isinstance(query, Mapping):
        question, number = text(query, "text"), identifier(query, "qid")
    else:
        question = text(row, "query")
        numbers = {identifier(holder, "qid") for holder in ([row] if "qid" in row else hits)}
        if len(numbers) > 1:
            raise RowError(f"hits of several queries: 'qid' is {shown(sorted(numbers))}")
        number = numbers.pop()
    context = clip("\n".join(passage.text for passage in passages[:ITEMS]))
    return Example(number, context, question, (), ranking=Ranking(tuple(passages)))


def _passage(hit: Any) -> Passage:
    document = hit
    if isinstance(hit, Mapping) and isinstance(hit.get("doc"), Mapping):
        document = hit["doc"]
    keys = ("content", "contents", "text", "segment", "passage")
    key = next((k for k in keys if isinstance(document, Mapping) and k in document), "content")
    score = cell(hit, "score")
    if isinstance(score, bool) or not isinstance(score, (int, float)):
        raise RowError(f"'score' is {shown(score)}, expected a number")
    return Passage(identifier(hit, "docid"), text(document, key), float(score))


def _with_grades(example: Example, qrels: Qrels) -> Example:
    assert example.ranking is not None
    grades = tuple(qrels.get(example.id, {}).items())
    ranking = Ranking(example.ranking.passages, grades)
    return Example(example.id, example.context, example.question, (), ranking=ranking)
