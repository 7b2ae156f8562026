"""Pieces that conversions of rows to examples share."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from latentwire_fast.data.examples import Example

Row = Mapping[str, Any]
# Enough for questions that need several paragraphs, short enough for small readers.
SENTENCES_PER_ITEM, ITEMS, CONTEXT_CHARS = 4, 3, 2000


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


def choice_example(identifier: str, question: str, choices: list[str], gold: int) -> Example:
    """A multiple-choice question whose answer is the choice's text.

    Not its letter: the official normalisation deletes the article, and so the answer, "A".
    """
    options = "\n".join(f"- {choice}" for choice in choices)
    return Example(
        id=identifier,
        context=f"{question}\n{options}",
        question="Which of the options is correct?",
        answers=(choices[gold],),
    )
