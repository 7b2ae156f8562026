"""Search in two stages: one reader ranks the passages that BM25 found, another one answers from the
best.

The first reader ranks by how likely it finds the query, given a passage (Ponte and Croft, 1998;
with language models as they are, Sachan et al., 2022).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any, Literal

import numpy as np

from latentwire_fast.config.base import require
from latentwire_fast.data.examples import Example, Passage, Ranking
from latentwire_fast.errors import ConfigError
from latentwire_fast.evaluation.methods.bm25_sentences import bm25_index
from latentwire_fast.evaluation.metrics import Interval, f1
from latentwire_fast.evaluation.patterns.base import (
    Pattern,
    PatternCase,
    PatternConfig,
    PatternResult,
    PatternRow,
    pattern_examples,
)
from latentwire_fast.evaluation.patterns.costs import Cost, Work
from latentwire_fast.evaluation.patterns.given import Given
from latentwire_fast.evaluation.patterns.panel import AskedReader, ReaderPanel
from latentwire_fast.evaluation.ranking import mrr, ndcg

RANKING_QUESTION = "Which question does this text answer?"
LIMIT = 10  # of MRR@10 and NDCG@10


class TwoStage(Pattern):
    """Passages from BM25, ranked by one reader, and an answer from the best by another.

    `found` is the file's own order. A reader ranks the first `depth` passages; the others keep
    their places behind them.
    """

    @dataclass(frozen=True)
    class Config(PatternConfig):
        """Settings.

        Attributes:
            ranker, answerer: names of readers; the run's first and last unless given.
            first_stage: `found`: the order of the file. `bm25s`: an order of our own over all
                passages of the file, by the library bm25s.
            depth: how many passages of each query are ranked.
            relevant: the lowest grade that counts for MRR. Unless given, 2 (relevant, to TREC's
                judges) where there are grades above 1, else 1.
        """

        ranker: str | None = None
        answerer: str | None = None
        first_stage: Literal["found", "bm25s"] = "found"
        depth: int = 10
        relevant: int | None = None

        def __post_init__(self) -> None:
            super().__post_init__()
            self.at_least_one("depth", "relevant")
            require(self.depth <= 1000, f"depth={self.depth}, expected at most 1000")

    config: Config
    title = "Ranking and answering"

    def run(self, case: PatternCase) -> PatternResult:
        """Rankings and answers, given each thing."""
        usual = "trec=FILE or ms_marco=FILE"
        searches = pattern_examples(case, usual=usual, usable=_is_usable)
        if self.config.first_stage == "bm25s":
            searches = retrieved(searches)
        searches = searches[: case.count]
        run = _Searches(self.config, case, searches)
        rows = [run.first_stage()]
        records = [{"id": s.id, "query": s.question, "answers": [*s.answers]} for s in searches]
        facts: dict[str, Any] = {
            "ranker": run.ranker,
            "answerer": run.answerer,
            "depth": self.config.depth,
            "relevant_grade": run.relevant,
            "minus_first_stage": {},
        }
        for given in case.given:
            new, differences = run.of(given, records)
            rows += new
            facts["minus_first_stage"][given] = differences
        if not any(search.answers for search in searches):
            facts["f1"] = "not measured: the data has no answers"
        return PatternResult(str(case.data), len(searches), rows, 0, facts, records)


def retrieved(searches: Sequence[Example]) -> list[Example]:
    """The queries with the passages that BM25 finds for them among those of all queries, as many as
    each had."""
    known = {p.id: p for search in searches for p in _ranking(search).passages}
    passages = [*known.values()]
    scores_of = bm25_index([passage.text for passage in passages])
    found = []
    for search in searches:
        order = np.argsort(-np.array(scores_of(search.question)), kind="stable")
        ranking = _ranking(search)
        best = tuple(passages[i] for i in order[: len(ranking.passages)])
        found.append(replace(search, ranking=replace(ranking, passages=best)))
    return found


def _ranking(search: Example) -> Ranking:
    assert search.ranking is not None
    return search.ranking


def _is_usable(example: Example) -> bool:
    """Whether a query has passages, and somebody judged some."""
    return bool(example.ranking and example.ranking.passages and example.ranking.grades)


class _Searches:
    """The queries, their passages and the two readers."""

    def __init__(
        self, config: TwoStage.Config, case: PatternCase, searches: Sequence[Example]
    ) -> None:
        self.case, self.searches, self.depth = case, searches, config.depth
        self.ranker = _reader(case, config.ranker, "ranker", default=0)
        self.answerer = _reader(case, config.answerer, "answerer", default=-1)
        self.grades = [dict(_ranking(search).grades) for search in searches]
        highest = max(max(own.values()) for own in self.grades)
        self.relevant = config.relevant or min(2, max(1, highest))
        self.found = [_ranking(search).passages for search in searches]
        self.label = "BM25 (bm25s)" if config.first_stage == "bm25s" else "BM25 (the file's order)"
        self.heads = [passages[: config.depth] for passages in self.found]
        self.ranks = ReaderPanel(
            case,
            [
                Example(f"{search.id}/{p.id}", p.text, RANKING_QUESTION, (search.question,))
                for search, head in zip(searches, self.heads, strict=True)
                for p in head
            ],
        )

    def first_stage(self) -> PatternRow:
        """BM25's own order: no reader is asked."""
        orders = [[passage.id for passage in passages] for passages in self.found]
        scores = self._scores(orders)
        sizes = [len(head[0].text.encode()) for head in self.heads]
        return PatternRow("text", self.label, self._intervals(scores), Cost.of(sizes, Work()))

    def of(
        self, given: Given, records: Sequence[dict[str, Any]]
    ) -> tuple[list[PatternRow], dict[str, Any]]:
        """Rows of the ranker's order and of BM25's, each with the answers from its best passage;
        and the ranker's scores minus BM25's."""
        order, likelihoods = self._rank(given)
        found = [[passage.id for passage in passages] for passages in self.found]
        ranking = self._ranking_cost(given)
        rows, scores = [], {}
        for label, orders, cost in (
            (f"{self.ranker} ranks", order, ranking),
            ("BM25 ranks", found, Cost(0, 0, 0)),
        ):
            scores[label] = self._scores(orders)
            answers, f1s, answering = self._answer(given, orders)
            own = scores[label] | ({"f1": f1s} if f1s else {})
            total = Cost(  # the best passage is one of those that were sent to be ranked
                max(cost.bytes, answering.bytes),
                cost.gflops + answering.gflops,
                cost.ms + answering.ms,
                max(cost.sender_gflops, answering.sender_gflops),
                max(cost.sender_ms, answering.sender_ms),
            )
            method = f"{label}, {self.answerer} answers"
            rows.append(PatternRow(given, method, self._intervals(own), total))
            for i, record in enumerate(records):
                entry: dict[str, Any] = {"best": orders[i][0], "answer": answers[i]}
                if label.startswith(self.ranker):
                    entry["query_logprobs"] = likelihoods[i]
                record.setdefault(given, {})[label] = entry
        ours, theirs = scores.values()
        differences = {name: self.case.difference(ours[name], theirs[name]) for name in ours}
        return rows, differences

    def _rank(self, given: Given) -> tuple[list[list[str]], list[dict[str, float]]]:
        """Passage ids by query, the likeliest first, and the log-probabilities behind it."""
        reader = self.ranks.reader(self.ranker, given)
        pairs = [(i, example.answers[0]) for i, example in enumerate(self.ranks.examples)]
        totals = iter([likelihood.total() for likelihood in reader.likelihoods(pairs)])
        orders, likelihoods = [], []
        for passages, head in zip(self.found, self.heads, strict=True):
            own = {passage.id: next(totals) for passage in head}
            ranked = sorted(own, key=lambda name, own=own: -own[name])  # type: ignore[misc]
            orders.append([*ranked, *(p.id for p in passages[self.depth :])])
            likelihoods.append(own)
        return orders, likelihoods

    def _answer(
        self, given: Given, orders: Sequence[Sequence[str]]
    ) -> tuple[list[str], list[float], Cost]:
        """Answers from the best passages, their F1 where there are answers, and what one costs."""
        examples = [
            replace(search, context=_text_of(passages, order[0]))
            for search, passages, order in zip(self.searches, self.found, orders, strict=True)
        ]
        panel = ReaderPanel(self.case, examples)
        reader, options = panel.reader(self.answerer, given), self.case.decoding
        answers = [own for (own,) in reader.answers(options)]
        work = reader.cost(lambda own, _: own.answers(options), panel.timed)
        cost = Cost.of(panel.texts.sizes(given), work, panel.sender(given))
        if not all(search.answers for search in self.searches):
            return answers, [], cost
        scored = [f1(a, e.answers) for a, e in zip(answers, examples, strict=True)]
        return answers, scored, cost

    def _ranking_cost(self, given: Given) -> Cost:
        """What the ranking of one query's passages costs: the number of passages times one."""
        reader, examples = self.ranks.reader(self.ranker, given), self.ranks.examples

        def score(own: AskedReader, i: int) -> object:
            return own.likelihoods([(0, examples[i].answers[0])])

        one = reader.cost(score, self.ranks.timed)
        per_query = len(examples) / len(self.searches)
        sizes, sender = self.ranks.texts.sizes(given), self.ranks.sender(given)
        return Cost.of([per_query * mean(sizes)], one.times(per_query), sender.times(per_query))

    def _scores(self, orders: Sequence[Sequence[str]]) -> dict[str, list[float]]:
        pairs = [*zip(orders, self.grades, strict=True)]
        return {
            "mrr@10": [mrr(o, g, limit=LIMIT, relevant=self.relevant) for o, g in pairs],
            "ndcg@10": [ndcg(o, g, limit=LIMIT) for o, g in pairs],
        }

    def _intervals(self, scores: Mapping[str, Sequence[float]]) -> dict[str, Interval]:
        return {name: self.case.interval(values) for name, values in scores.items()}


def _text_of(passages: Sequence[Passage], identifier: str) -> str:
    return next(passage.text for passage in passages if passage.id == identifier)


def _reader(case: PatternCase, name: str | None, role: str, *, default: int) -> str:
    if name is None:
        return case.readers[default]
    if name not in case.readers:
        raise ConfigError(f"{role}={name!r}: this run has {', '.join(case.readers)}")
    return name
