"""The one form in which every data set reaches training, evaluation and scoring."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "heldout", "all"]


@dataclass(frozen=True)
class Example:
    """One question on one context.

    Attributes:
        id: unique within its data set.
        context: the text that a context-only latent replaces.
        question: the question, without a prefix such as `Question:`.
        answers: accepted answers; the first is the training target, all count for scores.
    """

    id: str
    context: str
    question: str
    answers: tuple[str, ...]
