"""The base class of patterns: ways in which several readers of one run work on a task together.

A pattern asks readers through `ReaderPanel` (`panel.py`) and gives rows: a method, its scores with
their intervals, and what one question costs by it. Every row is measured with the text, and with
payloads in its place. `docs/extending.md` has a complete example from outside the package.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from latentwire_fast.config.base import PartSettings
from latentwire_fast.config.schema import RunConfig
from latentwire_fast.data.examples import Example
from latentwire_fast.data.sources import load_examples
from latentwire_fast.errors import ConfigError, DataError
from latentwire_fast.evaluation.metrics import Interval, mean_interval, paired_interval
from latentwire_fast.evaluation.patterns.costs import Cost
from latentwire_fast.evaluation.patterns.given import Given
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.readers.decoding import DecodeOptions
from latentwire_fast.registry import PATTERNS, Registry
from latentwire_fast.serving import Receiver


@dataclass(frozen=True)
class PatternConfig(PartSettings):
    """Settings of a pattern."""

    registry: ClassVar[Registry] = PATTERNS


@dataclass(frozen=True)
class PatternCase:
    """A run's model and readers, and what they are to be tried on.

    Attributes:
        config: of the run: batch size, seed, resamples, timed examples, longest answer.
        receivers: by reader.
        data: what the command line names; None where it names nothing.
        count: how many questions are scored, at most; None: all.
        given: what readers are given, in the order of the table.
        progress: show progress bars.
    """

    config: RunConfig
    model: Interlingua
    receivers: Mapping[str, Receiver]
    data: str | None
    count: int | None
    given: tuple[Given, ...]
    progress: bool = True

    @property
    def readers(self) -> list[str]:
        """The readers' names."""
        return [*self.receivers]

    @property
    def decoding(self) -> DecodeOptions:
        """How answers are decoded, as in the run's evaluation."""
        settings = self.config.evaluation
        return DecodeOptions(
            max_new_tokens=settings.max_new_tokens,
            first_token_temperature=settings.first_token_temperature,
            first_token_top_p=settings.first_token_top_p,
            eos_ban_steps=settings.eos_ban_steps,
            seed=self.config.seed,
        )

    def interval(
        self, values: Sequence[float], clusters: Sequence[Hashable] | None = None
    ) -> Interval:
        """Mean of per-question values, with its bootstrap interval."""
        resamples = self.config.evaluation.resamples
        seed = self.config.seed
        return mean_interval(values, seed=seed, resamples=resamples, clusters=clusters)

    def difference(
        self, a: Sequence[float], b: Sequence[float], clusters: Sequence[Hashable] | None = None
    ) -> dict[str, float]:
        """Mean of `a - b` over the same questions, with its interval, as JSON."""
        resamples, seed = self.config.evaluation.resamples, self.config.seed
        found = paired_interval(a, b, seed=seed, resamples=resamples, clusters=clusters)
        return found._asdict()


@dataclass(frozen=True)
class PatternRow:
    """One method, given one thing.

    Attributes:
        scores: by their name, each a share of 1.
        cost: of one question.
    """

    given: Given
    method: str
    scores: Mapping[str, Interval]
    cost: Cost

    def to_json(self) -> dict[str, Any]:
        """The row in the results file."""
        scores = {name: interval._asdict() for name, interval in self.scores.items()}
        return {"given": self.given, "method": self.method, "scores": scores, **vars(self.cost)}


@dataclass(frozen=True)
class PatternResult:
    """What a pattern came to.

    Attributes:
        data: what it was measured on.
        questions: how many were scored.
        validation: how many others something was fitted on; no score is of them.
        facts: what was fitted or chosen, and differences between rows.
        records: one JSON object for each question.
    """

    data: str
    questions: int
    rows: Sequence[PatternRow]
    validation: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)
    records: Sequence[Mapping[str, Any]] = ()


def needs_two_readers(case: PatternCase, title: str) -> None:
    """Raise unless the run has two readers or more.

    Raises:
        ConfigError: it has one.
    """
    if len(case.readers) < 2:
        raise ConfigError(
            f"{title} is about two readers or more, this run has {', '.join(case.readers)} alone; "
            "train a run with two (train --reader A=... --reader B=...)"
        )


def pattern_examples(
    case: PatternCase,
    split: Literal["train", "heldout"] = "heldout",
    *,
    usual: str,
    usable: Callable[[Example], bool],
) -> list[Example]:
    """All examples of a split of what `--data` names, in an order that the run's seed decides.

    Args:
        usual: what is given there, for messages: `mmlu=FILE`.
        usable: whether a pattern can be measured on an example.

    Raises:
        ConfigError: it names nothing. DataError: it cannot be read, or is of another kind.
    """
    if case.data is None:
        raise ConfigError(f"no data is named; give it as --data {usual}")
    data = case.config.data
    found = load_examples(
        case.data, split=split, count=None, seed=data.eval_seed, data=data, whole=True
    )
    chosen = [example for example in found if usable(example)]
    if not chosen:
        raise DataError(f"{case.data}: no example that this pattern needs; give --data {usual}")
    return chosen


class Pattern(ABC):
    """One way in which readers work together.

    Attributes:
        title: in words, for the terminal.
    """

    Config: ClassVar[type[PatternConfig]]
    title: ClassVar[str]

    def __init__(self, config: PatternConfig) -> None:
        self.config = config

    @abstractmethod
    def run(self, case: PatternCase) -> PatternResult:
        """Measure it.

        Raises:
            ConfigError: the run has not the readers for it, or no data is named.
            DataError: the data cannot be read.
        """
