"""How answers are compared, by language: SQuAD's rules for English, MLQA's for other languages.

MLQA (Lewis et al. 2020) deletes each language's articles and all of Unicode's punctuation, and
takes every Chinese character for a word.
"""

from __future__ import annotations

import logging
import re
import string
import sys
import unicodedata
from collections.abc import Sequence
from functools import cache

from latentwire_fast.data.examples import Example

logger = logging.getLogger(__name__)

_ENGLISH_ARTICLES = re.compile(r"\b(a|an|the)\b")
_ENGLISH_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = {
    "es": r"\b(un|una|unos|unas|el|la|los|las)\b",
    "vi": r"\b(của|là|cái|chiếc|những)\b",
    "de": r"\b(ein|eine|einen|einem|eines|einer|der|die|das|den|dem|des)\b",
    "ar": r"\sال^|ال",  # noqa: RUF001 (as MLQA has it)
    "hi": None,
    "zh": None,
}
_CHINESE = re.compile(r"([\u4e00-\u9fa5])")
# A set where one answer in so many is mostly of other letters than Latin ones is not English.
_OTHER_SCRIPTS = 20


def normalize_answer(text: str, language: str = "en") -> str:
    """Lower case, no punctuation, no articles, single spaces.

    Args:
        language: `en` is the official SQuAD v1.1 script, which knows ASCII punctuation only; the
            others are MLQA's.
    """
    if language == "en":
        plain = text.lower().translate(_ENGLISH_PUNCTUATION)
        return " ".join(_ENGLISH_ARTICLES.sub(" ", plain).split())
    plain = text.lower().translate(_punctuation())
    if articles := _ARTICLES[language]:
        plain = re.sub(articles, " ", plain)
    if language == "zh":
        plain = _CHINESE.sub(r" \1 ", plain)
    return " ".join(plain.split())


def warn_of_scripts(examples: Sequence[Example], *, source: str) -> None:
    """Log where English rules are applied to answers in another script."""
    others = [
        e.answers[0]
        for e in examples
        if e.language == "en" and e.answers and _is_of_another_script(e.answers[0])
    ]
    if others and len(others) * _OTHER_SCRIPTS >= len(examples):
        logger.warning(
            "%s: %d of %d answers are in another script, such as %r, and are compared by English "
            "rules; set data.language (--language of score): ar, de, es, hi, vi or zh",
            source,
            len(others),
            len(examples),
            others[0][:40],
        )


def _is_of_another_script(text: str) -> bool:
    letters = [character for character in text if character.isalpha()]
    latin = sum(unicodedata.name(letter, "").startswith("LATIN") for letter in letters)
    return latin < len(letters) / 2


@cache
def _punctuation() -> dict[int, None]:
    """All of Unicode's punctuation, for `str.translate`."""
    marks = (n for n in range(sys.maxunicode) if unicodedata.category(chr(n))[0] == "P")
    return dict.fromkeys([*marks, *map(ord, string.punctuation)])
