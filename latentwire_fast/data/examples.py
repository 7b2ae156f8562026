"""The one form in which every data set reaches training, evaluation and scoring."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Split = Literal["train", "heldout", "all"]


@dataclass(frozen=True)
class Choices:
    """The answers that a multiple-choice question offers.

    Attributes:
        texts: all of them, as the set lists them.
        correct: the numbers of the correct ones.
        best: the number of the one that counts where only one may be correct.
        question: what was asked, without the choices.
    """

    texts: tuple[str, ...]
    correct: tuple[int, ...]
    best: int
    question: str = field(default="", compare=False)

    @property
    def single(self) -> tuple[str, ...]:
        """The best choice, and then every incorrect one: TruthfulQA's MC1."""
        wrong = (text for i, text in enumerate(self.texts) if i not in self.correct)
        return (self.texts[self.best], *wrong)


@dataclass(frozen=True)
class Passage:
    """A passage of a ranking. `score`: the ranker's, where there is one."""

    id: str
    text: str
    score: float | None = None


@dataclass(frozen=True)
class Ranking:
    """Passages for a question, and which of them answer it.

    Attributes:
        passages: in the ranker's order, the best first.
        grades: (passage id, grade) of every passage that was judged, also of those not retrieved.
    """

    passages: tuple[Passage, ...]
    grades: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Example:
    """One question on one context.

    Attributes:
        id: unique within its data set.
        context: the text that a context-only latent replaces.
        question: the question, without a prefix such as `Question:`.
        answers: accepted answers; the first is the training target, all count for scores.
        choices: of a multiple-choice question.
        ranking: of a question that came with passages.
        subject: what its set files it under: MMLU's subject, TruthfulQA's category.
        set_name: the set or file of a source that it is of.
        language: whose rules compare its answers (`evaluation/languages.py`).
    """

    id: str
    context: str
    question: str
    answers: tuple[str, ...]
    choices: Choices | None = None
    ranking: Ranking | None = None
    subject: str = ""
    set_name: str = field(default="", compare=False)
    language: str = field(default="en", compare=False)
