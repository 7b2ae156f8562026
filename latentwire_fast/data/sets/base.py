"""The base class of data sets: how a set is named, what it gives, and how it is trained on.

    class Riddles(DataSet):
        @dataclass(frozen=True)
        class Config(DataSetConfig):
            hard: bool = False

        is_built_in = True

        def load(self, place, *, split, count, seed):
            return Loaded(my_riddles(self.config.hard), is_of_split=False)

    DATA_SETS.register("riddles", Riddles)          # now `--data riddles` works

Sets of rows, from the hub or from saved copies, are `HubSet`s (`hub_set.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

from latentwire_fast.config.base import PartSettings
from latentwire_fast.config.schema import DataConfig, Mode
from latentwire_fast.data.examples import Example, Split
from latentwire_fast.data.streams import Stream
from latentwire_fast.registry import DATA_SETS, Registry


@dataclass(frozen=True)
class DataSetConfig(PartSettings):
    """Settings of a data set."""

    registry: ClassVar[Registry] = DATA_SETS


class Loaded(NamedTuple):
    """Examples in an order that the seed decides.

    Attributes:
        is_of_split: they are all of the split that was asked for; otherwise the caller cuts them by
            a hash of their contexts.
    """

    examples: Iterable[Example]
    is_of_split: bool


class DataSet(ABC):
    """Examples of one kind, from one place.

    Attributes:
        is_built_in: it makes its examples itself: a run names it alone, and gives no path.
        has_questions: its examples have questions, on which a run can be scored.
        metric: the score by which this set is known, beside exact match and F1: `f1`, `accuracy`
            or `rougeL`.
        is_endless: it makes training batches without end (`stream`), and has no list of all.
    """

    Config: ClassVar[type[DataSetConfig]]
    is_built_in: ClassVar[bool] = False
    is_endless: ClassVar[bool] = False
    has_questions: ClassVar[bool] = True
    metric: ClassVar[str] = "f1"

    def __init__(self, config: DataSetConfig) -> None:
        self.config = config

    @classmethod
    def settings(cls, data: DataConfig) -> DataSetConfig:
        """The settings that a run's `DataConfig` stands for; the defaults unless a set reads it."""
        return cls.Config()

    @abstractmethod
    def load(self, place: Path | None, *, split: Split, count: int | None, seed: int) -> Loaded:
        """The set's examples.

        Args:
            place: the path that the run gives; None where it gives none.
            count: how many are wanted at most; more may be given.
            seed: the order.

        Raises:
            DataError: nothing readable there.
        """

    def stream(self, data: DataConfig, *, mode: Mode, seed: int) -> Stream:
        """Training batches without end; only of a set that `is_endless`."""
        raise NotImplementedError(f"{type(self).__name__} has an end")
