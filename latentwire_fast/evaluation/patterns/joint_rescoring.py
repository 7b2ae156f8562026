"""Joint rescoring: the readers score each other's answers, and a rule says which one is taken.

`evaluation/joint.py` has the plain sum, which hypothesis H4 is about.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from latentwire_fast.config.base import require
from latentwire_fast.data.examples import Example
from latentwire_fast.data.sources import heldout_examples, load_examples, split_validation
from latentwire_fast.evaluation.languages import normalize_answer
from latentwire_fast.evaluation.metrics import exact_match, f1
from latentwire_fast.evaluation.patterns.base import (
    Pattern,
    PatternCase,
    PatternConfig,
    PatternResult,
    PatternRow,
    needs_two_readers,
)
from latentwire_fast.evaluation.patterns.calibration import (
    TEMPERATURES,
    Combiner,
    best_temperature,
)
from latentwire_fast.evaluation.patterns.costs import Cost, Work
from latentwire_fast.evaluation.patterns.given import Given
from latentwire_fast.evaluation.patterns.panel import AnswerLikelihood, AskedReader, ReaderPanel
from latentwire_fast.readers.context_limit import ContextLimit

RULES = ("sum", "temperature", "logistic")
# Per reader that scores, of each reader's answers to every example: at temperature 1 and its own.
Scores = Mapping[str, Mapping[str, Sequence[AnswerLikelihood]]]


@dataclass(frozen=True)
class _Answered:
    """What all readers make of all examples.

    Attributes:
        answers: by the reader that gave them.
        scores: by the reader that scores, then by the one that answered.
    """

    answers: Mapping[str, Sequence[str]]
    scores: Scores

    def features(self, i: int, own: str) -> list[float]:
        """Of one reader's answer to example `i`; `feature_names` says which."""
        words = normalize_answer(self.answers[own][i]).split()
        likelihoods = [scores[own][i].mean(1) for scores in self.scores.values()]
        repeated = 1 - len({*words}) / len(words) if words else 0.0
        whose = [float(name == own) for name in [*self.answers][1:]]
        return [*likelihoods, math.log1p(len(words)), repeated, *whose]

    @property
    def feature_names(self) -> list[str]:
        names = [*self.answers]
        scored = [f"log-probability under {name}" for name in names]
        return [*scored, "length", "repetition", *(f"answer of {name}" for name in names[1:])]


class JointRescoring(Pattern):
    """Each reader answers; all score all answers; one answer is taken.

    `sum` adds the mean log-probabilities per token, `temperature` does so with each reader's logits
    divided by its own temperature, and `logistic` asks the combiner.
    """

    @dataclass(frozen=True)
    class Config(PatternConfig):
        """Settings.

        Attributes:
            validation: how many questions the temperatures and the combiner are fitted on. None of
                their contexts is scored.
            l2: weight decay of the combiner.
        """

        validation: int = 100
        l2: float = 1.0

        def __post_init__(self) -> None:
            super().__post_init__()
            self.at_least_one("validation")
            require(self.l2 >= 0, f"l2={self.l2}, expected at least 0")

    config: Config
    title = "Joint rescoring"

    def run(self, case: PatternCase) -> PatternResult:
        """Answers, scores, what is fitted, and all rules on what is left."""
        needs_two_readers(case, self.title)
        tested, fitted = self._examples(case)
        panel = ReaderPanel(case, [*tested, *fitted])
        rows: list[PatternRow] = []
        facts: dict[str, Any] = {}
        records: list[dict[str, Any]] = [
            {"id": e.id, "question": e.question, "answers": [*e.answers]} for e in tested
        ]
        for given in case.given:
            found = self._of_one(case, panel, given, len(tested), records)
            rows += found[0]
            facts[given] = found[1]
        data = case.data or "the run's held-out examples"
        return PatternResult(data, len(tested), rows, len(fitted), facts, records)

    def _examples(self, case: PatternCase) -> tuple[list[Example], list[Example]]:
        """Examples to score, and others on other contexts to fit on."""
        data, wanted = case.config.data, self.config.validation
        readers = {name: receiver.reader for name, receiver in case.receivers.items()}
        limit = ContextLimit(readers, data.max_context_tokens)
        count = None if case.count is None else case.count + wanted
        if case.data is None:
            count = data.eval_examples + wanted if count is None else count
            examples = heldout_examples(data, count=count, keep=limit.fits)
        else:
            examples = load_examples(
                case.data,
                split="heldout",
                count=count,
                seed=data.eval_seed,
                data=data,
                whole=True,
                keep=lambda example: bool(example.answers) and limit.fits(example),
            )
        limit.report(case.data or data.eval_source or data.source)
        tested, fitted = split_validation(examples, wanted)
        return tested[: case.count], fitted

    def _of_one(
        self,
        case: PatternCase,
        panel: ReaderPanel,
        given: Given,
        tested: int,
        records: list[dict[str, Any]],
    ) -> tuple[list[PatternRow], dict[str, Any]]:
        """Rows and facts with one thing given; adds to the records."""
        readers = panel.readers(given)
        fit = range(tested, len(panel.examples))
        calibrated = {name: _calibrate(reader, fit) for name, reader in readers.items()}
        temperatures = {name: entry["temperature"] for name, entry in calibrated.items()}
        answers = {
            name: [own for (own,) in reader.answers(case.decoding)]
            for name, reader in readers.items()
        }
        answered = _Answered(answers, _score(readers, answers, temperatures))
        combiner = self._fit(answered, panel.examples, fit)
        chosen: dict[str, list[str]] = {name: list(own) for name, own in answers.items()}
        for rule in RULES:
            chosen[rule] = [
                answers[_choose(answered, i, rule, combiner)][i] for i in range(len(panel.examples))
            ]
        facts = {"readers": calibrated, "combiner": combiner.to_json()}
        return self._report(case, panel, given, tested, records, chosen, facts)

    def _fit(
        self, answered: _Answered, examples: Sequence[Example], rows: Sequence[int]
    ) -> Combiner:
        """The combiner, whose target is an answer's F1."""
        pairs = [(i, name) for i in rows for name in answered.answers]
        features = np.array([answered.features(i, name) for i, name in pairs])
        targets = [f1(answered.answers[name][i], examples[i].answers) for i, name in pairs]
        names = answered.feature_names
        return Combiner.fit(features, np.array(targets), names=names, l2=self.config.l2)

    def _report(
        self,
        case: PatternCase,
        panel: ReaderPanel,
        given: Given,
        tested: int,
        records: list[dict[str, Any]],
        chosen: Mapping[str, Sequence[str]],
        facts: dict[str, Any],
    ) -> tuple[list[PatternRow], dict[str, Any]]:
        examples = panel.examples
        f1s = {m: [f1(a, e.answers) for a, e in zip(own, examples, strict=True)]
               for m, own in chosen.items()}  # fmt: skip
        f1s["oracle"] = [max(v) for v in zip(*(f1s[name] for name in case.readers), strict=True)]
        best = max(case.readers, key=lambda name: sum(f1s[name][tested:]))
        clusters = [example.context for example in examples[:tested]]
        costs = self._costs(case, panel, given, chosen, tested)
        rows = []
        for method, values in f1s.items():
            scores = {"f1": case.interval(values[:tested], clusters)}
            if method in chosen:
                own = zip(chosen[method], examples[:tested], strict=False)
                em = [exact_match(answer, example.answers) for answer, example in own]
                scores["em"] = case.interval(em, clusters)
            rows.append(PatternRow(given, method, scores, costs[method]))
        facts["best_reader_on_validation"] = best
        pairs = [(rule, best) for rule in RULES] + [(rule, "sum") for rule in RULES[1:]]
        facts["f1_differences"] = {
            f"{a} minus {b}": case.difference(f1s[a][:tested], f1s[b][:tested], clusters)
            for a, b in pairs
        }
        for i, record in enumerate(records):
            record[given] = {m: {"answer": own[i], "f1": f1s[m][i]} for m, own in chosen.items()}
        return rows, facts

    def _costs(
        self,
        case: PatternCase,
        panel: ReaderPanel,
        given: Given,
        chosen: Mapping[str, Sequence[str]],
        tested: int,
    ) -> dict[str, Cost]:
        """What one question costs by each method; an oracle is none, and costs what rescoring
        does."""
        readers, timed = panel.readers(given), panel.timed
        answering = {
            name: reader.cost(lambda own, _: own.answers(case.decoding), timed)
            for name, reader in readers.items()
        }

        def score(reader: AskedReader, i: int) -> object:
            return reader.likelihoods([(0, chosen[name][i]) for name in readers])

        scoring = sum((reader.cost(score, timed) for reader in readers.values()), Work())
        sizes, sender = panel.texts.sizes(given)[:tested], panel.sender(given)
        every = sum(answering.values(), scoring)
        costs = {name: Cost.of(sizes, work, sender) for name, work in answering.items()}
        return costs | {rule: Cost.of(sizes, every, sender) for rule in (*RULES, "oracle")}


def _calibrate(reader: AskedReader, rows: Sequence[int]) -> dict[str, float]:
    """A reader's temperature, and NLL per token of the validation answers before and with it."""
    pairs = [(i, reader.examples[i].answers[0]) for i in rows]
    found = reader.likelihoods(pairs, temperatures=TEMPERATURES)
    tokens = sum(likelihood.tokens for likelihood in found)
    nll_K = -np.sum([likelihood.logprobs_Kn.sum(1) for likelihood in found], 0) / tokens
    return {
        "temperature": best_temperature(nll_K),
        "nll_at_1": float(nll_K[TEMPERATURES.index(1.0)]),
        "nll_at_best": float(nll_K.min()),
    }


def _score(
    readers: Mapping[str, AskedReader],
    answers: Mapping[str, Sequence[str]],
    temperatures: Mapping[str, float],
) -> dict[str, dict[str, list[AnswerLikelihood]]]:
    """All readers' scores of all answers, at temperature 1 and at their own."""
    scores: dict[str, dict[str, list[AnswerLikelihood]]] = {}
    for name, reader in readers.items():
        pairs = [(i, answer) for own in answers.values() for i, answer in enumerate(own)]
        found = reader.likelihoods(pairs, temperatures=(1.0, temperatures[name]))
        count = len(reader.examples)
        parts = [found[i : i + count] for i in range(0, len(found), count)]
        scores[name] = dict(zip(answers, parts, strict=True))
    return scores


def _choose(answered: _Answered, i: int, rule: str, combiner: Combiner) -> str:
    """The reader whose answer to example `i` a rule takes; the first of equals."""
    names = [*answered.answers]
    if rule == "logistic":
        totals = combiner.logits(np.array([answered.features(i, name) for name in names]))
    else:
        k = int(rule == "temperature")
        scores = answered.scores.values()
        totals = np.array([sum(own[name][i].mean(k) for own in scores) for name in names])
    return names[int(totals.argmax())]
