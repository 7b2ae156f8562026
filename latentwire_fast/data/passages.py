"""Search queries with the passages that were found for them, and how relevant these are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentwire_fast.data.sets.rows import Row, distinct, records
from latentwire_fast.errors import DataError
from latentwire_fast.files.text import decode_text, read_unpacked

Grades = Mapping[str, int]
NO_ANSWER = "No Answer Present."


@dataclass(frozen=True)
class Passage:
    """One passage that was found.

    Attributes:
        id: the same text has the same id for every query.
    """

    id: str
    text: str


@dataclass(frozen=True)
class SearchQuery:
    """One query.

    Attributes:
        passages: in the order in which they were found, the best first.
        grades: by passage id, how relevant a judge found it; a passage that is not here was not
            judged, and counts as not relevant.
        answers: accepted answers, if the file has any.
    """

    id: str
    text: str
    passages: tuple[Passage, ...]
    grades: Grades
    answers: tuple[str, ...] = ()


def load_searches(path: Path, *, qrels: Path | None = None) -> list[SearchQuery]:
    """Queries with their passages.

    Args:
        path: JSON or JSON lines (.xz and .gz too), of records with `query` and `hits` (each with
            `content`, `qid`, `docid`, best first), or of MS MARCO's rows with `query`, `query_id`,
            `answers` and `passages`, whose `is_selected` is their grade.
        qrels: TREC's judgments, lines of query id, a field that is not used, passage id and grade.
            Needed for hits; queries that nobody judged are left out.

    Raises:
        DataError: unreadable, or a record of another form.
    """
    rows = _rows(path)
    if not rows:
        raise DataError(f"{path}: no queries")
    if all("hits" in row for row in rows):
        if qrels is None:
            raise DataError(
                f"{path} says which passages were found, not which are relevant; give the "
                "judgments as qrels=FILE"
            )
        judged = load_qrels(qrels)
        found = [_parsed(_of_hits, row, path, i) for i, row in enumerate(rows)]
        known = [(query, judged[query.id]) for query in found if query.id in judged]
        if not known:
            raise DataError(f"{qrels}: judges none of the {len(found)} queries of {path}")
        return [
            SearchQuery(query.id, query.text, query.passages, grades) for query, grades in known
        ]
    return [_parsed(_of_marco, row, path, i) for i, row in enumerate(rows)]


def load_qrels(path: Path) -> dict[str, dict[str, int]]:
    """Grades by query id and passage id.

    Raises:
        DataError: unreadable, or a line of another form.
    """
    grades: dict[str, dict[str, int]] = {}
    for number, line in enumerate(_text(path).splitlines(), start=1):
        try:
            query, _, passage, grade = line.split()
            grades.setdefault(query, {})[passage] = int(grade)
        except ValueError:
            raise DataError(
                f"{path}: line {number} is {line[:60]!r}, expected query id, 0, passage id, grade"
            ) from None
    return grades


def _text(path: Path) -> str:
    try:
        return decode_text(read_unpacked(path), name=str(path))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None


def _rows(path: Path) -> list[Row]:
    text = _text(path)
    try:
        rows = json.loads(text) if text.startswith("[") else [*map(json.loads, text.splitlines())]
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: neither JSON nor JSON lines ({error})") from None
    if not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: expected records, one for each query")
    return rows


def _parsed(parse: Any, row: Row, path: Path, number: int) -> SearchQuery:
    try:
        query: SearchQuery = parse(row)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{path}: query {number} is not of the form of hits or of MS MARCO: "
            f"{type(error).__name__}: {error}"
        ) from None
    if not query.passages:
        raise DataError(f"{path}: query {number} ({query.text[:40]!r}) has no passages")
    return query


def _of_hits(row: Row) -> SearchQuery:
    hits = row["hits"]
    passages = tuple(Passage(str(hit["docid"]), hit["content"].strip()) for hit in hits)
    return SearchQuery(str(hits[0]["qid"]), row["query"].strip(), passages, {})


def _of_marco(row: Row) -> SearchQuery:
    query, found = str(row["query_id"]), records(row["passages"])
    texts = [record["passage_text"].strip() for record in found]
    passages = tuple(Passage(f"{query}-{i}", text) for i, text in enumerate(texts))
    grades = {p.id: int(record["is_selected"]) for p, record in zip(passages, found, strict=True)}
    answers = distinct(answer for answer in row["answers"] if answer != NO_ANSWER)
    return SearchQuery(query, row["query"].strip(), passages, grades, answers)
