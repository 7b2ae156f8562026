"""TruthfulQA (Lin et al. 2022), with one correct choice (MC1)."""

from __future__ import annotations

import random
from dataclasses import dataclass

from latentwire_fast.data.examples import Example
from latentwire_fast.data.sets.hub_set import HubConfig, HubSet
from latentwire_fast.data.sets.rows import Row, choice_example, digest


class TruthfulQA(HubSet):
    """Multiple-choice questions that many people answer wrongly."""

    @dataclass(frozen=True)
    class Config(HubConfig):
        """Where the rows are."""

        path: str = "truthfulqa/truthful_qa"
        columns: tuple[str, ...] = ("question", "mc1_targets")
        subset: str | None = "multiple_choice"
        train: str = "validation"
        heldout: str = "validation"

    def convert(self, row: Row) -> Example:
        """The choices, shuffled by the question: the file lists the correct one first."""
        targets = row["mc1_targets"]
        question, choices = row["question"].strip(), list(targets["choices"])
        gold = choices[list(targets["labels"]).index(1)]
        identifier = digest(question)
        random.Random(identifier).shuffle(choices)
        return choice_example(identifier, question, choices, choices.index(gold))
