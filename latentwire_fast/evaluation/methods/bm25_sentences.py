"""The sentences that match the question best, to as many positions as the latent."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import bm25s

from latentwire_fast.data.examples import Example
from latentwire_fast.evaluation.methods.base import EvaluationCase, MethodConfig
from latentwire_fast.evaluation.methods.shortened import Budget, Parts, ShortenedText
from latentwire_fast.prompts.sentences import sentences

logging.getLogger("bm25s").setLevel(logging.WARNING)  # it tells of each index at DEBUG


def bm25_index(texts: Sequence[str]) -> Callable[[str], list[float]]:
    """What gives the BM25 score (Lucene's form, k1 = 1.5, b = 0.75) of each text for a question; 0
    without a word in common."""
    words = _words(texts)
    if not any(words):  # bm25s has no index of no words
        return lambda question: [0.0] * len(texts)
    index = bm25s.BM25()
    index.index(words, show_progress=False)

    def scores(question: str) -> list[float]:
        (asked,) = _words([question])
        if not asked:
            return [0.0] * len(texts)
        return [float(score) for score in index.get_scores(asked)]

    return scores


def bm25_scores(texts: Sequence[str], question: str) -> list[float]:
    """The scores of `bm25_index` for one question."""
    return bm25_index(texts)(question)


def _words(texts: Sequence[str]) -> list[list[str]]:
    words: list[list[str]] = bm25s.tokenize(
        [*texts],
        stopwords=None,
        token_pattern=r"(?u)\b\w+\b",
        return_ids=False,
        show_progress=False,
    )
    return words


@lru_cache(maxsize=8192)  # every reader and every bit width asks for the same ones
def scored_sentences(context: str, question: str) -> Parts:
    """The sentences of a context and their BM25 scores for a question."""
    parts = sentences(context)
    return parts, bm25_scores(parts, question)


class BM25Sentences(ShortenedText):
    """The sentences with the highest BM25 score for the question.

    The sender must know the question, which a latent of context mode does not.
    """

    @dataclass(frozen=True)
    class Config(MethodConfig):
        """No settings."""

    label, kind = "Retrieved sentences", "budget"
    note = "those that match the question best, in M positions"
    console_label: ClassVar[str | None] = "sentences"  # none for the one that inherits from it
    budget: ClassVar[Budget] = "positions"

    def parts(self, case: EvaluationCase, example: Example) -> Parts:
        """The sentences of the context and their scores."""
        return scored_sentences(example.context, example.question)
