"""The sections of a report, in their order: a section is there where its content is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Anchor in the page, and title. Both templates take the titles from here.
SECTIONS = {
    "hypotheses": "Hypotheses",
    "accuracy": "Accuracy against bytes",
    "bytes": "Bytes of the same text",
    "readers": "Readers",
    "sets": "By data set",
    "patterns": "The readers on one task",
    "continuation": "Going on with a text",
    "joint": "The readers together",
    "extra": "Further scores",
    "training": "Training",
    "collapse": "Is it collapsing?",
    "good": "Answered correctly from the payload",
    "bad": "Answered wrong from the payload",
    "reproduce": "How to reproduce",
}


def sections(view: Mapping[str, Any], figures: Mapping[str, str]) -> dict[str, str]:
    """The titles of the sections that this report has, by anchor.

    Args:
        view: of `build_view`.
        figures: those that were drawn.
    """
    content = {
        "accuracy": view["widths"] or "accuracy" in figures,
        "bytes": view["text_bytes"],
        "training": view["validation"] or "learning" in figures,
        "good": view["shown_examples"]["good"] or view["shown_examples"]["bad"],
        "bad": view["shown_examples"]["good"] or view["shown_examples"]["bad"],
        "reproduce": True,
    }
    return {key: title for key, title in SECTIONS.items() if content.get(key, view.get(key))}
