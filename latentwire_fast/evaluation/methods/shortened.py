"""The base class of methods that send the best parts of a context, as many as a budget allows.

The question is kept. In pure mode, where a latent stands for the question too, it takes its share
of the budget.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

from latentwire_fast.data.examples import Example
from latentwire_fast.evaluation.methods.base import (
    EvaluationCase,
    EvaluationMethod,
    MethodInput,
    cut_utf8,
    text_input,
)
from latentwire_fast.evaluation.pruning import best_parts
from latentwire_fast.prompts.builder import context_text, full_text, question_text

Budget = Literal["positions", "bytes"]
Parts = tuple[Sequence[str], Sequence[float]]  # of one context, and how much each is worth


class ShortenedText(EvaluationMethod):
    """The best parts of a context in the order of the text, then the question.

    Attributes:
        budget: what they may take: as many positions as the latent, or as many bytes as the
            payload.
    """

    budget: ClassVar[Budget]

    @abstractmethod
    def parts(self, case: EvaluationCase, example: Example) -> Parts:
        """The parts of an example's context, and how much each is worth."""

    def build(self, case: EvaluationCase, rows: range, *, bits: int) -> MethodInput:
        """As many parts as fit."""
        in_budget = self._in_positions if self.budget == "positions" else self._in_bytes
        return text_input(case, rows, [in_budget(case, i, bits) for i in rows])

    def _in_positions(self, case: EvaluationCase, row: int, bits: int) -> list[int]:
        example, ids = case.examples[row], case.reader.prompts.text_ids
        question = ids(question_text(example.question))
        left = case.positions_of(row) - (len(question) if case.mode == "pure" else 0)
        most = case.free_label + max(0, left)
        text = self._best(case, example, lambda text: len(ids(context_text(text))) <= most)
        return [*ids(context_text(text))[:most], *question]

    def _in_bytes(self, case: EvaluationCase, row: int, bits: int) -> list[int]:
        example, size = case.examples[row], case.payload_size(row, bits=bits)

        def replaced(text: str) -> str:  # what counts; in context mode the question is free
            return full_text(text, example.question) if case.mode == "pure" else text

        text = self._best(case, example, lambda text: len(replaced(text).encode()) <= size)
        user = full_text(text, example.question)
        return case.reader.prompts.text_ids(cut_utf8(user, size) if case.mode == "pure" else user)

    def _best(self, case: EvaluationCase, example: Example, fits: Callable[[str], bool]) -> str:
        parts, scores = self.parts(case, example)
        return best_parts(parts, scores, fits)
