"""Where the sentences of a text end."""

from __future__ import annotations

import re

# Behind what ends a sentence, with the marks and brackets that close around it; or an empty line.
_END = re.compile(r"[.!?\u2026]+[\"'\u201d\u2019)\]]*(?=\s)|[\u3002\uff01\uff1f]+|\n\s*\n")


def sentence_ends(text: str) -> list[int]:
    """The number of characters up to the end of each sentence but the last."""
    return [match.end() for match in _END.finditer(text)]


def sentences(text: str) -> list[str]:
    """The sentences of a text, without the spaces between them."""
    ends = sentence_ends(text)
    parts = (text[a:b].strip() for a, b in zip([0, *ends], [*ends, len(text)], strict=True))
    return [part for part in parts if part]
