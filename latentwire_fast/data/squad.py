"""SQuAD v1.1 and v2.0 JSON files (Rajpurkar et al. 2016, 2018) as examples.

Rows in the columns of the hub, as a JSON list or one per line, are read too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latentwire_fast.data.examples import Example
from latentwire_fast.data.row_files import RowFile, has_lines, is_json, line_rows, rows_of
from latentwire_fast.errors import DataError
from latentwire_fast.files.json_files import read_json
from latentwire_fast.files.text import read_unpacked

# What a generating reader is taught to say where v2.0 has no answer; scoring files use "" instead.
NO_ANSWER = "unanswerable"
_COLUMNS = ("context", "question", "answers")  # of rows
_EXPECTED = '{"data": [{"paragraphs": [{"context", "qas": [{"id", "question", "answers"}]}]}]}'


def load_squad(
    path: Path, *, no_answer: str = NO_ANSWER, articles: slice | None = None
) -> list[Example]:
    """All questions of a SQuAD file in file order.

    Args:
        path: a v1.1 or v2.0 file, or a file of rows; it may be packed (.json.xz, .json.gz).
        no_answer: the answer of questions marked `is_impossible`, and of rows without answers.
        articles: which of the articles, in the order of their titles; None for all.

    Raises:
        DataError: a missing or malformed file (with article, paragraph and question, counted from
            0), an id that occurs twice, or a question without answers that is not `is_impossible`.
    """
    examples: list[Example] = []
    seen: dict[str, str] = {}
    for where, context, question in _all_questions(path, articles):
        example = _example(question, context, where, no_answer)
        if example.id in seen:
            raise DataError(
                f"{where}: id {example.id!r} occurs before, at {seen[example.id]}; "
                "ids name predictions, so each may occur once: remove one of the two"
            )
        seen[example.id] = where
        examples.append(example)
    if not examples:
        raise DataError(f"{path}: holds no questions; expected {_EXPECTED}")
    return examples


def version_of(path: Path) -> int:
    """The version of a file that `load_squad` reads: 2 where it says so, or has questions without
    an answer, else 1."""
    for _, _, record in _all_questions(path, None):
        if "is_impossible" in record or not record["answers"]:
            return 2
        if isinstance(record["answers"], dict) and not record["answers"]["text"]:
            return 2
    data = read_json(path, error=DataError) if is_squad_json(path) else {}
    return 2 if str(data.get("version", "")).lower().lstrip("v").startswith("2") else 1


def is_squad_json(path: Path) -> bool:
    """Whether a file is one of articles, by a glance at what it holds."""
    if not is_json(path):
        return False
    content = read_unpacked(path)
    return content.lstrip(b"\xef\xbb\xbf \r\n\t")[:1] == b"{" and b'"paragraphs"' in content


def _all_questions(path: Path, articles: slice | None) -> Iterator[tuple[str, str, Any]]:
    """(place in the file, context, question record) in file order.

    Raises:
        DataError: unreadable, or articles of a file of rows.
    """
    data: Any = None
    is_of_lines = has_lines(path) and path.is_file()
    if not is_of_lines:
        try:
            data = read_json(path, error=DataError)
        except DataError as error:
            if "Extra data" not in str(error):
                raise
            is_of_lines = True
    rows = data.get("data") if isinstance(data, dict) else data
    is_of_rows = isinstance(rows, list) and bool(rows) and _is_row(rows[0])
    if not (is_of_lines or is_of_rows):
        chosen = None if articles is None else _chosen(data, articles, str(path))
        yield from _questions(data, str(path), chosen)
        return
    if articles is not None:
        raise DataError(f"{path}: holds rows, which have no articles; leave out the [...]")
    file = RowFile(str(path), path.stem, read_unpacked(path))
    for row in line_rows(file) if is_of_lines else rows_of(file):
        record = row.read()
        yield row.where, _field(record, "context", str, row.where), record


def _is_row(value: Any) -> bool:
    return isinstance(value, dict) and all(column in value for column in _COLUMNS)


def _chosen(data: Any, articles: slice, path: str) -> set[int]:
    """The numbers of the articles in a slice of all, which are ordered by title.

    Raises:
        DataError: an article without a title, or no article in the slice.
    """
    found = _field(data, "data", list, path)
    titles = [_field(entry, "title", str, f"{path}: article {a}") for a, entry in enumerate(found)]
    chosen = sorted(range(len(titles)), key=titles.__getitem__)[articles]
    if not chosen:
        start, stop = ("" if end is None else end for end in (articles.start, articles.stop))
        raise DataError(f"{path}[{start}:{stop}]: no article; the file has {len(titles)} of them")
    return set(chosen)


def _questions(data: Any, path: str, chosen: set[int] | None) -> Iterator[tuple[str, str, Any]]:
    """(place in the file, context, question record) in file order, of the chosen articles."""
    for a, article in enumerate(_field(data, "data", list, path)):
        if chosen is not None and a not in chosen:
            continue
        where_a = f"{path}: article {a}"
        for p, paragraph in enumerate(_field(article, "paragraphs", list, where_a)):
            where_p = f"{where_a}, paragraph {p}"
            context = _field(paragraph, "context", str, where_p)
            for q, question in enumerate(_field(paragraph, "qas", list, where_p)):
                yield f"{where_p}, question {q}", context, question


def _example(record: Any, context: str, where: str, no_answer: str) -> Example:
    answers = _answers(record, where)
    found = [
        _field(answer, "text", str, f"{where}, answer {i}") for i, answer in enumerate(answers)
    ]
    texts = [text.strip() for text in found if text.strip()]
    is_impossible = record.get("is_impossible") is True
    if not texts and (is_impossible or isinstance(record["answers"], dict)):
        texts = [no_answer]
    if not texts:
        raise DataError(
            f"{where}: no answer with a text; a v2.0 file marks such questions with "
            '"is_impossible": true, a test set without answers cannot be used'
        )
    return Example(
        id=_identifier(record, where),
        context=context,
        question=_field(record, "question", str, where).strip(),
        answers=tuple(dict.fromkeys(texts)),
    )


def _answers(record: Any, where: str) -> list[Any]:
    """The answers as records of a `text`; the hub has a record of lists instead."""
    if isinstance(record, dict) and isinstance(record.get("answers"), dict):
        texts = _field(record["answers"], "text", list, f"{where}, answers")
        return [{"text": text} for text in texts]
    answers: list[Any] = _field(record, "answers", list, where)
    if answers and all(isinstance(answer, str) for answer in answers):
        return [{"text": answer} for answer in answers]
    return answers


def _identifier(record: Any, where: str) -> str:
    """The id; a whole number becomes text."""
    value = record.get("id")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return str(_field(record, "id", str, where))


def _field(record: Any, key: str, kind: type, where: str) -> Any:
    """`record[key]`, which must be a `kind`."""
    if not isinstance(record, dict) or key not in record:
        found = type(record).__name__
        if isinstance(record, dict):  # it may be a file of predictions, with ten thousand keys
            found = f"{len(record):,} keys, first {sorted(record)[:5]}"
        raise DataError(f"{where}: no {key!r} (found {found}); a SQuAD file is {_EXPECTED}")
    value = record[key]
    if not isinstance(value, kind):
        raise DataError(
            f"{where}: {key!r} is {type(value).__name__}, expected {kind.__name__}; "
            f"a SQuAD file is {_EXPECTED}"
        )
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where}: {key!r} holds half of a surrogate pair (character {error.start}), which "
                "is no text; repair the file"
            ) from None
    return value
