"""Pieces that conversions of rows to examples share: cells that are checked, texts that are cut.

The functions of cells take a row and a column. Each raises a `RowError` that names the column; the
reader of the rows puts the place of the row before it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from latentwire_fast.data.examples import Choices, Example

Row = Mapping[str, Any]
# Enough for questions that need several paragraphs, short enough for small readers.
SENTENCES_PER_ITEM, ITEMS, CONTEXT_CHARS = 4, 3, 2000
LETTERS = "ABCDEFGHIJ"


class RowError(ValueError):
    """A row that is not of its set's form; the message names the column."""


def cell(row: Any, column: str) -> Any:
    """What a row has in a column.

    Raises:
        RowError: it is no row, or has no such column.
    """
    if not isinstance(row, Mapping):
        raise RowError(f"no {column!r}: {shown(row)} is no object")
    if column not in row:
        raise RowError(f"no {column!r} (found: {', '.join(map(str, row))})")
    return row[column]


def text(row: Any, column: str, *, strip: bool = True) -> str:
    """A text, without outer white space unless told otherwise.

    Raises:
        RowError: something else, or half of a surrogate pair.
    """
    value = _text(cell(row, column), repr(column))
    return value.strip() if strip else value


def texts(row: Any, column: str) -> list[str]:
    """A list of texts.

    Raises:
        RowError: something else.
    """
    values = items(row, column)
    return [_text(value, f"{column!r}, item {i}") for i, value in enumerate(values)]


def items(row: Any, column: str) -> list[Any]:
    """A list.

    Raises:
        RowError: something else.
    """
    value = cell(row, column)
    if not isinstance(value, (list, tuple)):
        raise RowError(f"{column!r} is {shown(value)}, expected a list")
    return list(value)


def identifier(row: Any, column: str = "id") -> str:
    """An id; a whole number becomes text.

    Raises:
        RowError: something else.
    """
    value = cell(row, column)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _text(value, repr(column)).strip()


def whole(row: Any, column: str) -> int:
    """A whole number.

    Raises:
        RowError: something else.
    """
    value = cell(row, column)
    if isinstance(value, bool) or not isinstance(value, int):
        raise RowError(f"{column!r} is {shown(value)}, expected a whole number")
    return value


def records_of(row: Any, column: str) -> list[dict[str, Any]]:
    """A nested column as a list of records.

    Raises:
        RowError: something else.
    """
    value = cell(row, column)
    try:
        found = records(value)
    except (TypeError, ValueError, AttributeError):
        found = None
    if found is None or not all(isinstance(record, Mapping) for record in found):
        raise RowError(f"{column!r} is {shown(value)}, expected a list of records")
    return found


def answer_texts(row: Any, column: str = "answers") -> tuple[str, ...]:
    """Answers: a list of texts, of records with a `text`, or a record of lists.

    Raises:
        RowError: something else.
    """
    value = cell(row, column)
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        return distinct(value)
    return distinct(text(record, "text") for record in records_of(row, column))


def shown(value: Any) -> str:
    """A value in a message, cut."""
    if value is None:
        return "null"
    written = repr(value)
    return written if len(written) <= 40 else written[:37] + "..."


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"{where} is {shown(value)}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(
            f"{where} holds half of a surrogate pair (character {error.start}), which is no text; "
            "repair the file"
        ) from None
    return value


def records(value: Any) -> list[dict[str, Any]]:
    """A nested column as a list of records; some files store it as a record of lists instead."""
    if isinstance(value, Mapping):
        keys = list(value)
        return [dict(zip(keys, row, strict=True)) for row in zip(*value.values(), strict=True)]
    return list(value)


def distinct(texts: Iterable[str]) -> tuple[str, ...]:
    """The texts without outer white space, empty ones and repeats, in their order."""
    return tuple(dict.fromkeys(text.strip() for text in texts if text.strip()))


def digest(*parts: str) -> str:
    """An id for a row that has none: the same text has the same id in any order of rows."""
    return hashlib.sha256("\x00".join(parts).encode()).hexdigest()[:16]


def first_items(items: list[str], *, preferred: Iterable[int]) -> list[str]:
    """At most `ITEMS` of the items in their order, the preferred ones before any other."""
    preferred = set(preferred)
    ranked = sorted(range(len(items)), key=lambda i: (i not in preferred, i))
    return [items[i] for i in sorted(ranked[:ITEMS])]


def clip(text: str) -> str:
    """At most `CONTEXT_CHARS` characters, cut between words."""
    if len(text) <= CONTEXT_CHARS:
        return text
    return text[: CONTEXT_CHARS + 1].rsplit(maxsplit=1)[0]


def choice_number(row: Any, column: str, count: int) -> int:
    """The number of a choice, written as 0, 1, ... or as A, B, ...

    Raises:
        RowError: something else, or no such choice.
    """
    value = cell(row, column)
    written = str(value).strip().upper() if isinstance(value, (int, str)) else ""
    if written in LETTERS[:count] and written:
        return LETTERS.index(written)
    if written.isdecimal() and not isinstance(value, bool) and int(written) < count:
        return int(written)
    raise RowError(
        f"{column!r} is {shown(value)}, expected 0 to {count - 1} or A to {LETTERS[count - 1]}"
    )


def choice_example(
    identifier: str,
    question: str,
    shown: list[str],
    *,
    choices: Choices,
    subject: str = "",
) -> Example:
    """A multiple-choice question whose answer is the best choice's text.

    Not its letter: the official normalisation deletes the article, and so the answer, "A".

    Args:
        shown: the choices that its context lists.
    """
    options = "\n".join(f"- {choice}" for choice in shown)
    return Example(
        id=identifier,
        context=f"{question}\n{options}",
        question="Which of the options is correct?",
        answers=(choices.texts[choices.best],),
        choices=replace(choices, question=question),
        subject=subject,
    )
