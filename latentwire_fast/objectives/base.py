"""The base class of objectives.

A batch is prepared first (prompts and counts), then the objectives are computed part by part, each
as a *sum*, which is divided by the whole batch's count. So a batch may be cut into micro-batches or
spread over processes without changing its gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal, cast

from torch import Tensor, nn

from latentwire_fast.config.schema import ObjectiveConfig
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.objectives.micro_batch import AnswerTerm, ReaderBatch
from latentwire_fast.objectives.prepared import PreparedItem
from latentwire_fast.readers.reader import Reader


class Objective(ABC):
    """One thing that readers and encoder are trained on; one for all readers.

    A subclass has a nested `Config(ObjectiveConfig)`: its weight, its own settings, and `check`.

    Attributes:
        counted: what its sum is a sum over. Only tokens count as training speed.
        needs_positions: whether it needs the positions that an encoder has chosen
            (`EncodedBatch.selection`).
        once: whether its sum is of the items alone: it is computed with the first of a step's
            readers, and counts once however many there are.
        needs_rate: whether it needs what the payloads take (`EncodedBatch.rate_B`).
        config: its settings.
        model: what is trained.
    """

    counted: ClassVar[Literal["tokens", "texts", "embeddings"]] = "tokens"
    needs_positions: ClassVar[bool] = False
    once: ClassVar[bool] = False
    needs_rate: ClassVar[bool] = False

    def __init__(self, config: ObjectiveConfig, model: Interlingua) -> None:
        self.config = config
        self.model = model

    @classmethod
    def build_head(
        cls, config: ObjectiveConfig, model: Interlingua, readers: Mapping[str, Reader]
    ) -> nn.Module | None:
        """What it trains beside the model, for all stages that have it; None for nothing.

        It is in the run's checkpoints, and not in the model that is saved: no receiver needs it.
        """
        return None

    @property
    def head(self) -> nn.Module:
        """What `build_head` made."""
        return self.model.heads[self.config.kind]

    def reader_head(self, reader: str) -> nn.Module:
        """The part of the head that is for one reader, where it is a `ModuleDict` by reader."""
        return cast(nn.ModuleDict, self.head)[reader]

    @property
    def term(self) -> AnswerTerm | None:
        """What it asks `ReaderBatch.answer_losses` for: the losses of a stage's objectives come
        from one pass over the reader's head. None: nothing."""
        return None

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the layers whose states at the answers' tokens it asks for, in
        `batch.answers.layers` and `batch.teacher_layers`: one pass gives those of all objectives.
        """
        return ()

    @abstractmethod
    def prepare(self, prepared: PreparedItem, reader: Reader) -> int:
        """Add the prompts that it reads of an item to `prepared`.

        Returns:
            How many terms its sum has for this item and reader.
        """

    def kept_bytes(self, prepared: PreparedItem, reader: Reader) -> int:
        """About how many bytes of frozen work it keeps on disk for an item and a reader, where the
        data set is finite."""
        return 0

    @abstractmethod
    def compute(self, batch: ReaderBatch) -> Tensor:
        """The sum over a micro-batch for one reader, 0-d.

        What else is to be reported, such as an accuracy, it gives to `batch.report`.
        """
