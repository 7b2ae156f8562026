"""MMLU (Hendrycks et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass

from latentwire_fast.data.examples import Example
from latentwire_fast.data.sets.hub_set import HubConfig, HubSet
from latentwire_fast.data.sets.rows import Row, choice_example, digest


class MMLU(HubSet):
    """Multiple-choice questions of 57 subjects."""

    @dataclass(frozen=True)
    class Config(HubConfig):
        """Where the rows are."""

        path: str = "cais/mmlu"
        columns: tuple[str, ...] = ("question", "subject", "choices", "answer")
        subset: str | None = "all"
        train: str = "auxiliary_train"
        heldout: str = "test"

    def convert(self, row: Row) -> Example:
        """The choices as context, the correct one's text as answer."""
        question, choices = row["question"].strip(), [str(choice) for choice in row["choices"]]
        identifier = digest(row["subject"], question, *choices)
        return choice_example(identifier, question, choices, int(row["answer"]))
