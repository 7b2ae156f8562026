"""Judgements of passages in TREC's format (qrels), and the files that hold them."""

from __future__ import annotations

import logging
from collections.abc import Set
from pathlib import Path

from latentwire_fast.errors import DataError
from latentwire_fast.files.text import read_text

logger = logging.getLogger(__name__)

Qrels = dict[str, dict[str, int]]  # by query, the grade of each passage


def read_qrels(path: Path) -> Qrels:
    """The judgements of a file.

    Raises:
        DataError: unreadable, a line of another form (with its number), or two grades of one
            passage.
    """
    found: Qrels = {}
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        cells = line.split()
        if not cells:
            continue
        where = f"{path}: line {number}"
        if len(cells) != 4:
            raise DataError(
                f"{where}: {len(cells)} columns, expected 4: a query, Q0, a passage and its grade"
            )
        query, _, passage, written = cells
        try:
            grade = int(written)
        except ValueError:
            raise DataError(f"{where}: grade {written!r}, expected a whole number") from None
        if found.setdefault(query, {}).setdefault(passage, grade) != grade:
            raise DataError(f"{where}: passage {passage} of query {query} has another grade before")
    return found


def qrels_beside(place: Path, queries: Set[str]) -> Qrels:
    """The judgements of these queries, from the files `qrels*` beside a file or in a folder.

    Raises:
        DataError: there are none, or files disagree.
    """
    folder = place if place.is_dir() else place.parent
    merged: Qrels = {}
    for path in sorted(p for p in folder.glob("qrels*") if p.is_file()):
        for query, grades in read_qrels(path).items():
            if query not in queries:
                continue
            if merged.setdefault(query, grades) != grades:
                raise DataError(
                    f"{path}: judges query {query} in another way than a file beside it"
                )
    missing = len(queries - merged.keys())
    if missing == len(queries):
        raise DataError(
            f"{place}: no judgements of its queries; put their qrels file (lines of a query, Q0, "
            f"a passage and its grade) beside it, as {folder / 'qrels.txt'}"
        )
    if missing:
        logger.warning("%s: %d of %d queries have no judgements", place, missing, len(queries))
    return merged
