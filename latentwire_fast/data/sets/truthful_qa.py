"""TruthfulQA (Lin et al. 2022): one correct choice (MC1) in the context, all of them beside it."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from latentwire_fast.data.examples import Choices, Example
from latentwire_fast.data.row_files import RowFile
from latentwire_fast.data.sets.hub_set import HubConfig, HubSet
from latentwire_fast.data.sets.rows import (
    Row,
    RowError,
    cell,
    choice_example,
    digest,
    distinct,
    items,
    shown,
    text,
    texts,
)


class TruthfulQA(HubSet):
    """Multiple-choice questions that many people answer wrongly.

    Read are its rows on the hub (`multiple_choice` and `generation`), `TruthfulQA.csv`, and
    `mc_task.json`, in which targets are an object of text and label.
    """

    @dataclass(frozen=True)
    class Config(HubConfig):
        """Where the rows are."""

        path: str = "truthfulqa/truthful_qa"
        columns: tuple[str, ...] = ("question", "mc1_targets")
        subset: str | None = "multiple_choice"
        train: str = "validation"
        heldout: str = "validation"

    files = "TruthfulQA.csv or mc_task.json"
    metric = "accuracy"

    def from_file(self, row: Row, file: RowFile) -> Row:
        """Lists of answers, or lists between semicolons, become targets."""
        if "mc1_targets" in row:
            targets = {key: _targets(row, key) for key in ("mc1_targets", "mc2_targets")}
            return {**row, **{key: value for key, value in targets.items() if value}}
        if "Best Answer" in row:
            best, category = text(row, "Best Answer"), text(row, "Category")
            correct, wrong = (
                distinct(text(row, f"{kind} Answers").split(";"))
                for kind in ("Correct", "Incorrect")
            )
            question = text(row, "Question")
        else:
            best, question = text(row, "best_answer"), text(row, "question")
            correct, wrong = (
                distinct(texts(row, f"{kind}_answers")) for kind in ("correct", "incorrect")
            )
            category = row.get("category", "")
        if not (best and wrong):
            raise RowError(f"no {'incorrect' if best else 'best'} answer of {shown(question)}")
        others = [answer for answer in correct if answer != best]
        return {
            "question": question,
            "category": category,
            "mc1_targets": _labelled([best], wrong),
            "mc2_targets": _labelled([best, *others], wrong),
        }

    def convert(self, row: Row) -> Example:
        """The choices of MC1, shuffled by the question: the file lists the correct one first."""
        question = text(row, "question")
        correct, wrong = _parts(row, "mc1_targets")
        if not correct:
            raise RowError("'mc1_targets' has no choice with label 1")
        best = correct[0]
        more, more_wrong = _parts(row, "mc2_targets") if row.get("mc2_targets") else ([], [])
        every = distinct([best, *more])
        rest = [choice for choice in distinct([*wrong, *more_wrong]) if choice not in every]
        choices = Choices((*every, *rest), tuple(range(len(every))), 0)
        listed = [str(choice) for choice in items(row["mc1_targets"], "choices")]
        identifier = digest(question)
        random.Random(identifier).shuffle(listed)
        subject = str(row.get("category") or "")
        return choice_example(identifier, question, listed, choices=choices, subject=subject)


def _labelled(correct: list[str], wrong: tuple[str, ...]) -> dict[str, list[Any]]:
    labels = [1] * len(correct) + [0] * len(wrong)
    return {"choices": [*correct, *wrong], "labels": labels}


def _targets(row: Row, column: str) -> Any:
    """Targets in the hub's form; those of `mc_task.json` are an object of text and label."""
    value = row.get(column)
    if isinstance(value, Mapping) and "labels" not in value:
        return {"choices": list(value), "labels": list(value.values())}
    return value


def _parts(row: Row, column: str) -> tuple[list[str], list[str]]:
    """The correct and the incorrect choices of targets.

    Raises:
        RowError: another form.
    """
    targets = cell(row, column)
    try:
        choices, labels = texts(targets, "choices"), items(targets, "labels")
    except RowError as error:
        raise RowError(f"{column!r}: {error}") from None
    if len(choices) != len(labels):
        raise RowError(f"{column!r}: {len(choices)} choices, but {len(labels)} labels")
    pairs = list(zip(choices, labels, strict=True))
    return [c for c, label in pairs if label == 1], [c for c, label in pairs if label != 1]
