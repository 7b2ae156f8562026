"""The context without the words that the reader expects, to as many positions as the latent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from latentwire_fast.data.examples import Example
from latentwire_fast.evaluation.methods.base import EvaluationCase, MethodConfig
from latentwire_fast.evaluation.methods.shortened import Budget, Parts, ShortenedText


class SelectiveContext(ShortenedText):
    """The words with the most self-information under the reader; the question is not seen.

    As in Selective Context (Li et al., arXiv:2310.06201), and in the first stage of LLMLingua
    (arXiv:2310.05736): what a language model expects anyway is left out. Units are words, and a
    word's score is the mean of -log p over its tokens: what it tells for each position.
    """

    @dataclass(frozen=True)
    class Config(MethodConfig):
        """No settings."""

    label, note, kind = (
        "Pruned text",
        "the words the reader expects least, in M positions",
        "budget",
    )
    budget: ClassVar[Budget] = "positions"

    def parts(self, case: EvaluationCase, example: Example) -> Parts:
        """The words of the context and their self-information."""
        return case.word_information[example.context]

    def fits(self, case: EvaluationCase) -> bool:
        """Whether the reader has the positions for every whole context: it must read it first."""
        return not case.reader.learns_positions or case.longest_text <= case.reader.max_positions
