"""Shorter texts: the parts of a text that score highest, as many as fit a budget."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

_WORD = re.compile(r"\S+")


def word_spans(text: str) -> list[tuple[int, int]]:
    """First character of each word of a text, and the one behind it; words stand between spaces."""
    return [match.span() for match in _WORD.finditer(text)]


def largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number from 0 to `most` that fits, where all smaller ones fit too; 0 is not
    asked."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


def best_parts(parts: Sequence[str], scores: Sequence[float], fits: Callable[[str], bool]) -> str:
    """As many of the best parts as fit together, in the order of the text.

    What is left of the budget goes to the first words of the next best part.

    Args:
        parts: words or sentences of one text; a space goes between them.
        scores: one per part; of equal ones the earlier part is taken first.
        fits: whether a text is within the budget. A part of a text that fits must fit too.
    """
    order = sorted(range(len(parts)), key=lambda i: (-scores[i], i))

    def joined(count: int, words: int = 0) -> str:
        chosen = {i: parts[i] for i in order[:count]}
        if words:
            chosen[order[count]] = " ".join(parts[order[count]].split()[:words])
        return " ".join(chosen[i] for i in sorted(chosen))

    count = largest(len(parts), lambda k: fits(joined(k)))
    if count == len(parts):
        return joined(count)
    words = len(parts[order[count]].split()) - 1  # all of them do not fit
    return joined(count, largest(words, lambda k: fits(joined(count, k))))
