"""Parts of a text within a budget: the best ones, in the text's order, and as many as fit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentwire_fast.evaluation.methods.bm25_sentences import bm25_scores
from latentwire_fast.evaluation.pruning import best_parts, largest, word_spans
from latentwire_fast.prompts.sentences import sentences


@given(st.lists(st.integers(0, 9), max_size=12), st.integers(0, 60))
def test_the_best_parts_are_kept_in_order_and_no_more_fit(scores: list[int], size: int) -> None:
    parts = [f"w{i}" for i in range(len(scores))]
    kept = best_parts(parts, scores, lambda text: len(text) <= size).split()
    assert len(" ".join(kept)) <= size
    order = sorted(range(len(parts)), key=lambda i: (-scores[i], i))
    assert set(kept) == {parts[i] for i in order[: len(kept)]}
    assert kept == [part for part in parts if part in kept]
    if len(kept) < len(parts):
        more = [parts[i] for i in sorted(order[: len(kept) + 1])]
        assert len(" ".join(more)) > size


def test_what_is_left_goes_to_the_start_of_the_next_part() -> None:
    parts = ["A short one.", "The best of all of them.", "Another."]
    kept = best_parts(
        parts, [2.0, 3.0, 1.0], lambda text: len(text) <= len("A short The best of all of them.")
    )
    assert kept == "A short The best of all of them."
    assert best_parts(parts, [2.0, 3.0, 1.0], lambda text: len(text) < 3) == ""
    assert best_parts([], [], lambda text: True) == ""


def test_largest_asks_for_few_numbers() -> None:
    asked: list[int] = []

    def fits(count: int) -> bool:
        asked.append(count)
        return count <= 700

    assert largest(1000, fits) == 700
    assert len(asked) <= 10
    assert largest(0, fits) == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two!  Three?", ["One.", "Two!", "Three?"]),
        ('He said "no." Then left', ['He said "no."', "Then left"]),
        ("3.5 is no end", ["3.5 is no end"]),
        ("  ", []),
        ("", []),
    ],
)
def test_sentences(text: str, expected: list[str]) -> None:
    assert sentences(text) == expected


def test_word_spans_are_words() -> None:
    text = " one  two\nthree "
    assert [text[a:b] for a, b in word_spans(text)] == text.split()


def test_bm25_prefers_the_sentence_of_the_question() -> None:
    texts = ["Ada is 94 years old.", "Ada lives in Bonn.", "Bob is fine."]
    scores = bm25_scores(texts, "Where does Ada live, and who lives in Bonn?")
    assert scores[1] == max(scores)
    assert scores[2] < scores[1]
    assert bm25_scores(["...", "?"], "who?") == [0.0, 0.0]
    assert bm25_scores(["a b"], "!") == [0.0]
    assert bm25_scores([], "who?") == []
