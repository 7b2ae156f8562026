"""What the bottleneck itself asks for: latents near their codes, and codes near their latents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from latentwire_fast.config.base import require
from latentwire_fast.config.schema import ObjectiveConfig, RunConfig
from latentwire_fast.models.bottlenecks.base import Bottleneck
from latentwire_fast.objectives.base import Objective
from latentwire_fast.objectives.micro_batch import ReaderBatch
from latentwire_fast.objectives.prepared import PreparedItem
from latentwire_fast.readers.reader import Reader
from latentwire_fast.registry import BOTTLENECKS


class Commitment(Objective):
    """The bottleneck's own loss (`Bottleneck.send`). It counts once for each reader, as the answers
    do, so that its weight against them does not depend on the number of readers."""

    @dataclass(frozen=True)
    class Config(ObjectiveConfig):
        """Settings of the loss: its weight alone. What it is made of, the bottleneck's settings
        say."""

        takes_chunks: ClassVar[bool] = True

        def check(self, run: RunConfig) -> None:
            """Raise unless the bottleneck has a loss, and the stage uses it."""
            part = BOTTLENECKS.part_of(run.bottleneck)
            require(
                part.send is not Bottleneck.send,
                f"objective {self.kind!r} needs a bottleneck with a loss of its own (vq or "
                f"residual_vq); {run.bottleneck.kind!r} has none: leave it out",
            )
            for stage in run.stages:
                uses = any(objective.kind == self.kind for objective in stage.objectives)
                require(
                    not uses or stage.quantize is not None,
                    f"stage {stage.name!r}: objective {self.kind!r} is about the latents that are "
                    f"sent; set quantize={run.bottleneck.bits}, or leave it out",
                )

    counted = "texts"

    def prepare(self, prepared: PreparedItem, reader: Reader) -> int:
        """Counts texts."""
        return 1

    def compute(self, batch: ReaderBatch) -> Tensor:
        """The sum over the texts."""
        loss_B = batch.encoded.bottleneck_loss_B
        assert loss_B is not None, "the stage sends latents through a bottleneck without a loss"
        return loss_B.sum()
