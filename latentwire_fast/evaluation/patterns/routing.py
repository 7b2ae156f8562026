"""Routing of MMLU's subjects: each goes to the reader that is better at it on other questions.

A routed question is read by one reader, a joint answer by all of them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from latentwire_fast.config.base import require
from latentwire_fast.data.choices import LETTERS, ChoiceQuestion, load_mmlu
from latentwire_fast.data.examples import Example
from latentwire_fast.errors import DataError
from latentwire_fast.evaluation.patterns.base import (
    Pattern,
    PatternCase,
    PatternConfig,
    PatternResult,
    PatternRow,
    needed_file,
    needs_two_readers,
)
from latentwire_fast.evaluation.patterns.costs import Cost, Work
from latentwire_fast.evaluation.patterns.given import Given
from latentwire_fast.evaluation.patterns.panel import AskedReader, ReaderPanel

QUESTION = "Which of the options is correct?"
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
            validation: `dev`: the five questions of each subject that MMLU has for prompts.
                `test`: so many of its test questions as `validation_rows`, which are not scored.
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
        path = needed_file(case, "MMLU's folder, or an archive of it,")
        fitted, tested = self._split(load_mmlu(path), case)
        questions = [*tested, *fitted]
        panel = ReaderPanel(case, [_example(question) for question in questions])
        rows: list[PatternRow] = []
        facts: dict[str, Any] = {}
        records: list[dict[str, Any]] = [
            {"id": q.id, "subject": q.subject, "correct": LETTERS[q.correct[0]]} for q in tested
        ]
        for given in case.given:
            for answers in self.config.answers:
                found = _Subjects(case, panel, questions, len(tested), given, answers)
                rows += found.rows()
                facts[f"{given}, {answers}"] = found.by_subject()
                found.record(records)
        source = "dev rows" if self.config.validation == "dev" else "other test rows"
        facts = {"validation": source, "subjects": facts}
        return PatternResult(str(path), len(tested), rows, len(fitted), facts, records)

    def _split(
        self, questions: Sequence[ChoiceQuestion], case: PatternCase
    ) -> tuple[list[ChoiceQuestion], list[ChoiceQuestion]]:
        """Questions to route by, and questions to score, in an order drawn with the seed."""
        config = self.config
        known = dict.fromkeys(question.subject for question in questions)
        for name in config.subjects:
            if name not in known:
                raise DataError(f"no subject {name!r} in the data; there are {', '.join(known)}")
        fitted: list[ChoiceQuestion] = []
        tested: list[ChoiceQuestion] = []
        for subject in config.subjects or known:
            own = [q for q in questions if q.subject == subject]
            test = [q for q in own if q.split == "test"]
            test = random.Random(f"{case.config.seed}:{subject}").sample(test, len(test))
            dev = [q for q in own if q.split == "dev"]
            if config.validation == "test":
                dev, test = test[: config.validation_rows], test[config.validation_rows :]
            if not (dev and test):
                raise DataError(
                    f"subject {subject!r} has {len(dev)} questions to route by and {len(test)} to "
                    "score; give MMLU's dev and test files, or --option validation=test"
                )
            fitted += dev[: config.validation_rows]
            tested += test[: config.per_subject]
        if case.count is not None and case.count < len(tested):
            tested = random.Random(case.config.seed).sample(tested, case.count)
        return fitted, tested


def _example(question: ChoiceQuestion) -> Example:
    options = zip(LETTERS, question.options, strict=False)
    lines = [question.question, *(f"{letter}. {option}" for letter, option in options)]
    gold = question.options[question.correct[0]]
    return Example(question.id, "\n".join(lines), QUESTION, (gold,))


class _Subjects:
    """What the readers choose, given one thing, by letters or by texts.

    Shapes: N questions, the scored ones first, C options.
    """

    def __init__(
        self,
        case: PatternCase,
        panel: ReaderPanel,
        questions: Sequence[ChoiceQuestion],
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
        gold_N = np.array([question.correct[0] for question in questions])
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
    reader: AskedReader, questions: Sequence[ChoiceQuestion], answers: Answers
) -> np.ndarray:
    """A reader's score of each option `[N, C]`: a letter's log-probability, or that of the text per
    token."""
    if answers == "letters":
        return reader.choices(LETTERS)
    pairs = [(i, option) for i, q in enumerate(questions) for option in q.options]
    found = reader.likelihoods(pairs)
    means = [likelihood.total() / max(1, likelihood.tokens - 1) for likelihood in found]
    return np.array(means).reshape(-1, len(LETTERS))


def _normalised(scores_NC: np.ndarray) -> np.ndarray:
    """Log-probabilities over the options."""
    top_N1 = scores_NC.max(1, keepdims=True)
    total_N1 = np.log(np.exp(scores_NC - top_N1).sum(1, keepdims=True)) + top_N1
    normalised_NC: np.ndarray = scores_NC - total_N1
    return normalised_NC
