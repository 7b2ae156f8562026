"""Routing of MMLU's subjects: each goes to the reader that is better at it on other questions.

A routed question is read by one reader, a joint answer by all of them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from latentwire_fast.config.base import require
from latentwire_fast.data.examples import Choices, Example
from latentwire_fast.errors import DataError
from latentwire_fast.evaluation.patterns.base import (
    Pattern,
    PatternCase,
    PatternConfig,
    PatternResult,
    PatternRow,
    needs_two_readers,
    pattern_examples,
)
from latentwire_fast.evaluation.patterns.costs import Cost, Work
from latentwire_fast.evaluation.patterns.given import Given
from latentwire_fast.evaluation.patterns.panel import AskedReader, ReaderPanel

LETTERS = "ABCD"
OPTIONS = len(LETTERS)
Answers = Literal["letters", "texts"]


class Routing(Pattern):
    """Each subject's questions go to the reader with the best validation accuracy on it; where
    readers are equal, to the one that is better over all subjects.

    The options stand in the context with their letters. A reader's choice is the likeliest letter,
    or the option whose text has the largest log-probability per token. `joint` adds the readers'
    log-probabilities of the options, each normalised over the four.
    """

    @dataclass(frozen=True)
    class Config(PatternConfig):
        """Settings.

        Attributes:
            answers: what readers choose between: the letters, the options' texts, or both in turn.
            validation: `dev`: the questions that the data has besides those to score, of which
                MMLU's files have five for each subject. `test`: so many of these as
                `validation_rows`, which are not scored then.
            validation_rows: of each subject, at most.
            per_subject: how many test questions of each subject are scored, at most; None: all.
            subjects: those alone; none: all.
        """

        answers: tuple[Answers, ...] = ("letters", "texts")
        validation: Literal["dev", "test"] = "dev"
        validation_rows: int = 5
        per_subject: int | None = None
        subjects: tuple[str, ...] = ()

        def __post_init__(self) -> None:
            super().__post_init__()
            self.at_least_one("validation_rows", "per_subject")
            require(bool(self.answers), "answers is empty, expected letters, texts or both")

    config: Config
    title = "Routing by subject"

    def run(self, case: PatternCase) -> PatternResult:
        """Accuracy of each reader, routed and joint, in all and by subject."""
        needs_two_readers(case, self.title)
        fitted, tested = self._split(case)
        questions = [*tested, *fitted]
        panel = ReaderPanel(case, [*map(_with_letters, questions)])
        rows: list[PatternRow] = []
        facts: dict[str, Any] = {}
        records: list[dict[str, Any]] = [
            {"id": q.id, "subject": q.subject, "correct": LETTERS[_choices(q).best]} for q in tested
        ]
        for given in case.given:
            for answers in self.config.answers:
                found = _Subjects(case, panel, questions, len(tested), given, answers)
                rows += found.rows()
                facts[f"{given}, {answers}"] = found.by_subject()
                found.record(records)
        source = "dev rows" if self.config.validation == "dev" else "other test rows"
        facts = {"validation": source, "subjects": facts}
        return PatternResult(str(case.data), len(tested), rows, len(fitted), facts, records)

    def _split(self, case: PatternCase) -> tuple[list[Example], list[Example]]:
        """Questions to route by, and questions to score, in an order that the seed decides."""
        config = self.config
        questions = pattern_examples(case, usual="mmlu=FILE", usable=_is_usable)
        others = questions
        if config.validation == "dev":
            others = pattern_examples(case, "train", usual="mmlu=FILE", usable=_is_usable)
        known = sorted({question.subject for question in questions})
        for name in config.subjects:
            if name not in known:
                raise DataError(f"no subject {name!r} in the data; there are {', '.join(known)}")
        fitted: list[Example] = []
        tested: list[Example] = []
        for subject in config.subjects or known:
            test = [q for q in questions if q.subject == subject]
            dev = [q for q in others if q.subject == subject]
            if config.validation == "test":
                test = test[config.validation_rows :]
            if not (dev and test):
                raise DataError(
                    f"subject {subject!r} has {len(dev)} questions to route by and {len(test)} to "
                    "score; give MMLU's dev and test files together, or --option validation=test"
                )
            fitted += dev[: config.validation_rows]
            tested += test[: config.per_subject]
        if case.count is not None and case.count < len(tested):
            tested = random.Random(case.config.seed).sample(tested, case.count)
        return fitted, tested


def _choices(question: Example) -> Choices:
    assert question.choices is not None
    return question.choices


def _is_usable(example: Example) -> bool:
    """Whether a question has a subject, and as many choices as MMLU's."""
    return bool(example.choices and example.subject and len(example.choices.texts) == OPTIONS)


def _with_letters(question: Example) -> Example:
    """The question with its options' letters in the context."""
    choices = _choices(question)
    options = zip(LETTERS, choices.texts, strict=False)
    lines = [choices.question, *(f"{letter}. {option}" for letter, option in options)]
    return replace(question, context="\n".join(lines))


class _Subjects:
    """What the readers choose, given one thing, by letters or by texts.

    Shapes: N questions, the scored ones first, C options.
    """

    def __init__(
        self,
        case: PatternCase,
        panel: ReaderPanel,
        questions: Sequence[Example],
        tested: int,
        given: Given,
        answers: Answers,
    ) -> None:
        self.case, self.panel, self.questions, self.tested = case, panel, questions, tested
        self.given, self.answers = given, answers
        self.readers = panel.readers(given)
        scores = {
            name: _option_scores(reader, questions, answers)
            for name, reader in self.readers.items()
        }
        gold_N = np.array([_choices(question).best for question in questions])
        self.choices = {name: score_NC.argmax(1) for name, score_NC in scores.items()}
        self.choices["joint"] = sum(map(_normalised, scores.values())).argmax(1)  # type: ignore[union-attr]
        self.right = {name: (c_N == gold_N).astype(float) for name, c_N in self.choices.items()}
        self.route = self._route()
        names = [self.route[question.subject] for question in questions]
        routed = [self.right[name][i] for i, name in enumerate(names)]
        self.right["routed"] = np.array(routed)
        self.right["oracle"] = np.max([self.right[name] for name in case.readers], axis=0)

    def _route(self) -> dict[str, str]:
        """The reader that each subject goes to."""
        overall = {name: self.right[name][self.tested :].mean() for name in self.case.readers}
        route = {}
        for subject in dict.fromkeys(question.subject for question in self.questions):
            places = [
                i
                for i in range(self.tested, len(self.questions))
                if self.questions[i].subject == subject
            ]
            accuracy = {name: self.right[name][places].mean() for name in self.case.readers}
            route[subject] = max(accuracy, key=lambda name: (accuracy[name], overall[name]))
        return route

    def rows(self) -> list[PatternRow]:
        """A row for each reader, and for routing, the joint choice and the oracle."""
        costs = self._costs()
        order = [*self.case.readers, "routed", "joint", "oracle"]
        return [
            PatternRow(
                self.given,
                f"{name} ({self.answers})",
                {"accuracy": self.case.interval([*self.right[name][: self.tested]])},
                costs[name],
            )
            for name in order
        ]

    def _costs(self) -> dict[str, Cost]:
        timed, panel = self.panel.timed, self.panel

        def score(reader: AskedReader, i: int) -> object:
            return _option_scores(reader, [self.questions[i]], self.answers)

        work = {name: reader.cost(score, timed) for name, reader in self.readers.items()}
        every = sum(work.values(), Work())
        scored = self.questions[: self.tested]
        shares = [self.route[question.subject] for question in scored]
        routed = sum(
            (own.times(shares.count(name) / len(shares)) for name, own in work.items()), Work()
        )
        work |= {"routed": routed, "joint": every, "oracle": every}
        sizes = panel.texts.sizes(self.given)[: self.tested]
        sender = panel.sender(self.given)
        return {name: Cost.of(sizes, own, sender) for name, own in work.items()}

    def by_subject(self) -> dict[str, Any]:
        """Per subject: questions, the chosen reader, and accuracies."""
        found: dict[str, Any] = {}
        for subject, reader in self.route.items():
            places = [i for i in range(self.tested) if self.questions[i].subject == subject]
            if places:
                accuracy = {m: float(right[places].mean()) for m, right in self.right.items()}
                found[subject] = {"questions": len(places), "reader": reader, **accuracy}
        return found

    def record(self, records: Sequence[dict[str, Any]]) -> None:
        """Add the letters that were chosen to the records."""
        for i, record in enumerate(records):
            own = {m: LETTERS[int(choice_N[i])] for m, choice_N in self.choices.items()}
            record[f"{self.given}, {self.answers}"] = own


def _option_scores(
    reader: AskedReader, questions: Sequence[Example], answers: Answers
) -> np.ndarray:
    """A reader's score of each option `[N, C]`: a letter's log-probability, or that of the text per
    token."""
    if answers == "letters":
        return reader.choices(LETTERS)
    pairs = [(i, option) for i, q in enumerate(questions) for option in _choices(q).texts]
    found = reader.likelihoods(pairs)
    means = [likelihood.total() / max(1, likelihood.tokens - 1) for likelihood in found]
    return np.array(means).reshape(-1, len(LETTERS))


def _normalised(scores_NC: np.ndarray) -> np.ndarray:
    """Log-probabilities over the options."""
    top_N1 = scores_NC.max(1, keepdims=True)
    total_N1 = np.log(np.exp(scores_NC - top_N1).sum(1, keepdims=True)) + top_N1
    normalised_NC: np.ndarray = scores_NC - total_N1
    return normalised_NC
