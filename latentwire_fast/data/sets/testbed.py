"""The testbed: passages about invented people, made as they are asked for (`data/testbed.py`)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from latentwire_fast.config.base import require
from latentwire_fast.config.schema import DataConfig, Mode
from latentwire_fast.data.examples import Split
from latentwire_fast.data.sets.base import DataSet, DataSetConfig, Loaded
from latentwire_fast.data.streams import Stream, TestbedStream
from latentwire_fast.data.testbed import make_examples
from latentwire_fast.errors import DataError


class Testbed(DataSet):
    """Passages without end; names of held-out passages are in no training passage."""

    __test__ = False

    @dataclass(frozen=True)
    class Config(DataSetConfig):
        """`facts`: per passage, 1 to 18. `similar`: the share of training passages with only two
        kinds of facts. A run gives them as settings of its data (`DataConfig`)."""

        facts: int = 4
        similar: float = 0.0

        def __post_init__(self) -> None:
            super().__post_init__()
            require(1 <= self.facts <= 18, f"facts={self.facts}, expected 1 to 18")
            require(0 <= self.similar <= 1, f"similar={self.similar}, expected 0 to 1")

    config: Config
    is_built_in = is_endless = True

    @classmethod
    def settings(cls, data: DataConfig) -> Config:
        """The run's facts and similar passages."""
        return cls.Config(facts=data.facts, similar=data.similar)

    def load(self, place: Path | None, *, split: Split, count: int | None, seed: int) -> Loaded:
        """`count` passages with one question each.

        Raises:
            DataError: no count, or both splits at once: there is no such list.
        """
        if split == "all" or count is None:
            raise DataError(
                "testbed: is generated without end, so training cannot mix it with other sources; "
                "for a list, give a count, and split train or heldout"
            )
        examples = make_examples(count, seed=seed, facts=self.config.facts, split=split)
        return Loaded(examples, is_of_split=True)

    def stream(self, data: DataConfig, *, mode: Mode, seed: int) -> Stream:
        """New passages at every step."""
        own = replace(data, facts=self.config.facts, similar=self.config.similar)
        return TestbedStream(own, mode=mode, seed=seed)
