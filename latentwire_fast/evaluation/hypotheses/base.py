"""The base class of hypotheses: a claim in words, a value with its interval, a bar, a verdict.

With several readers a hypothesis holds only if it holds for each: the value shown is the worst
reader's. Differences of F1 are shares of 1 (0.02 is 2 points). What compares with text is *not
measured* where a reader cannot do the task from text either: equal failures would otherwise pass.

`docs/extending.md` has a complete example of one from outside the package.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from latentwire_fast.config.base import PartSettings
from latentwire_fast.evaluation.method_result import MethodResult, mean
from latentwire_fast.evaluation.metrics import Interval, paired_interval, ratio_interval
from latentwire_fast.registry import HYPOTHESES, Registry

TIMES = "\N{MULTIPLICATION SIGN}"
NEEDS_TEXT_READERS = "readers that do the task from text"
# What a text score is held against before anything is compared with it: no context, or no model.
TEXT_FLOORS = ("closed_book", "first_words")
NOT_MEASURED: dict[str, Any] = {
    "value": None,
    "low": None,
    "high": None,
    "bar": None,
    "verdict": "not measured",
}


@dataclass(frozen=True)
class CodedEvidence:
    """The texts coded by a reader (`evaluation/coded_text.py`).

    Attributes:
        sizes: bytes of each example's text.
        first_token_ms: median milliseconds to an answer's first token, by what the reader is given.
    """

    sizes: Sequence[float]
    first_token_ms: Mapping[str, float | None]


@dataclass(frozen=True)
class Evidence:
    """The measurements that verdicts rest on.

    Attributes:
        methods: per reader and method.
        by_bits: per reader, method and bit width.
        joint: joint rescoring, with two readers or more.
        bits: the run's own bit width.
        payload_sizes: per bit width, the bytes of each example's payload.
        utf8_sizes, brotli_sizes: bytes of each example's text.
        are_added_readers: the encoder was trained without any of these readers.
        coded: the texts coded by each reader that can.
        seed, resamples: of the bootstrap. clusters: what is resampled together, per example.
    """

    methods: Mapping[str, Mapping[str, MethodResult]]
    by_bits: Mapping[str, Mapping[str, Mapping[int, MethodResult]]]
    joint: MethodResult | None
    bits: int
    payload_sizes: Mapping[int, Sequence[int]]
    utf8_sizes: Sequence[float]
    brotli_sizes: Sequence[int]
    are_added_readers: bool
    seed: int
    resamples: int
    clusters: Sequence[Hashable] | None = None
    coded: Mapping[str, CodedEvidence] = field(default_factory=dict)

    def difference(self, ours: Sequence[float], theirs: Sequence[float]) -> Interval:
        """The mean difference of two scores over the same examples."""
        return paired_interval(ours, theirs, **self._options())

    def ratio(self, ours: Sequence[float], theirs: Sequence[float]) -> Interval:
        """The ratio of two sums over the same examples."""
        return ratio_interval(ours, theirs, **self._options())

    def _options(self) -> dict[str, Any]:
        return {"seed": self.seed, "resamples": self.resamples, "clusters": self.clusters}

    def latent_against(self, method: str) -> Interval:
        """The latent's F1 minus a method's, for the reader where it is worst."""
        return min(
            self.difference(reader["latent"].f1, reader[method].f1)
            for reader in self.methods.values()
        )

    def has(self, *methods: str) -> bool:
        """Whether every reader was measured by all these methods."""
        return all(name in reader for reader in self.methods.values() for name in methods)

    def narrowest(self, *, kept: float) -> tuple[int, bool]:
        """The narrowest bit width that keeps a share of every reader's text F1; the narrowest of
        all, and False, where none does."""
        enough = [bits for bits in self.payload_sizes if self._keeps(bits, kept)]
        return min(enough or self.payload_sizes), bool(enough)

    def _keeps(self, bits: int, share: float) -> bool:
        return all(
            mean(self.by_bits[name]["latent"][bits].f1) >= share * mean(reader["text"].f1)
            for name, reader in self.methods.items()
        )

    def reads_text(self) -> bool:
        """Whether every reader's text score is above what needs no context or no model."""
        return self.has("text", *TEXT_FLOORS) and all(
            mean(reader["text"].f1) > max(mean(reader[floor].f1) for floor in TEXT_FLOORS)
            for reader in self.methods.values()
        )


@dataclass(frozen=True)
class HypothesisConfig(PartSettings):
    """Settings of a hypothesis.

    Attributes:
        bar: what the value is held against.
    """

    registry: ClassVar[Registry] = HYPOTHESES

    bar: float


class Hypothesis(ABC):
    """One claim that every evaluation tests. The registered name is its key in metrics.json.

    Attributes:
        quantity: what the value is.
        unit: `points` for a difference of F1, or `ratio`.
        side: whether the value must be at least, more than, at most or less than the bar.
        needs: what must be there for it to be measured, in words.
        reads: the methods that it compares.
        needs_text_readers: it is measured only with readers that do the task from text.
        also: how it can fail with a value that meets the bar.
    """

    Config: ClassVar[type[HypothesisConfig]]
    quantity: ClassVar[str]
    unit: ClassVar[Literal["points", "ratio"]]
    side: ClassVar[Literal["least", "above", "most", "below"]]
    needs: ClassVar[str]
    reads: ClassVar[tuple[str, ...]] = ("latent",)
    needs_text_readers: ClassVar[bool] = False
    also: ClassVar[str] = ""

    def __init__(self, config: HypothesisConfig) -> None:
        self.config = config

    @property
    @abstractmethod
    def claim(self) -> str:
        """The claim in words, with the bar in it."""

    @abstractmethod
    def judge(self, evidence: Evidence) -> dict[str, Any]:
        """The hypothesis' entry of metrics.json: `verdict(...)`, or `NOT_MEASURED`.

        All methods in `reads` were measured when this is called.
        """

    def circumstance(self, found: Mapping[str, Any]) -> str:
        """Under which circumstance an entry's value was measured, as words behind `quantity`."""
        return ""

    def meets(self, value: float, bar: float) -> bool:
        """Whether a value meets the bar."""
        return {
            "least": value >= bar,
            "above": value > bar,
            "most": value <= bar,
            "below": value < bar,
        }[self.side]

    def verdict(self, interval: Interval, *, also: bool = True, **more: Any) -> dict[str, Any]:
        """An entry of metrics.json.

        Args:
            also: whether the other conditions for a pass are met.
            more: further fields.
        """
        passed = self.meets(interval.mean, self.config.bar) and also
        return {
            "value": interval.mean,
            "low": interval.low,
            "high": interval.high,
            "bar": self.config.bar,
            "verdict": "pass" if passed else "fail",
            **more,
        }


def hypotheses() -> dict[str, Hypothesis]:
    """Every registered hypothesis by its name, with default settings."""
    return {name: HYPOTHESES[name](HYPOTHESES.config(name)) for name in HYPOTHESES.names()}


def judge_hypotheses(evidence: Evidence) -> dict[str, dict[str, Any]]:
    """The `hypotheses` entry of metrics.json."""
    reads_text = evidence.reads_text()
    return {
        name: hypothesis.judge(evidence)
        if evidence.has(*hypothesis.reads) and (reads_text or not hypothesis.needs_text_readers)
        else NOT_MEASURED
        for name, hypothesis in hypotheses().items()
    }
