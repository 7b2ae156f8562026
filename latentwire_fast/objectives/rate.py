"""Short payloads: the bits of a latent's symbols under how often they come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from latentwire_fast.config.base import require
from latentwire_fast.config.schema import ObjectiveConfig, RunConfig
from latentwire_fast.objectives.base import Objective
from latentwire_fast.objectives.micro_batch import ReaderBatch
from latentwire_fast.objectives.prepared import PreparedItem
from latentwire_fast.readers.reader import Reader


class Rate(Objective):
    """About how many bits the payload's body takes (`Bottleneck.rate`). Its weight trades bytes for
    answers. It counts once for each reader, as the answers do."""

    @dataclass(frozen=True)
    class Config(ObjectiveConfig):
        """Settings of the rate.

        Attributes:
            weight: per bit. A tenth of a nat of an answer for 100 bits is 0.001.
        """

        weight: float = 1e-3

        takes_chunks: ClassVar[bool] = True

        def check(self, run: RunConfig) -> None:
            """Raise unless the bottleneck measures a rate, and the stages that want it send at its
            own width."""
            bottleneck = run.bottleneck
            require(
                getattr(bottleneck, "running_prior", False),
                f"objective {self.kind!r} needs a bottleneck with running_prior=True (uniform of "
                f"version 2, fsq or soft_codebook); set it in the bottleneck {bottleneck.kind!r}",
            )
            for stage in run.stages:
                uses = any(objective.kind == self.kind for objective in stage.objectives)
                require(
                    not uses or stage.quantize == bottleneck.bits,
                    f"stage {stage.name!r}: objective {self.kind!r} is about latents that are sent "
                    f"at the bottleneck's own width; set quantize={bottleneck.bits}, or leave it "
                    "out",
                )

    counted = "texts"
    needs_rate = True

    def prepare(self, prepared: PreparedItem, reader: Reader) -> int:
        """Counts texts."""
        return 1

    def compute(self, batch: ReaderBatch) -> Tensor:
        """The bits of all texts."""
        rate_B = batch.encoded.rate_B
        assert rate_B is not None, "the stage sends latents at no width, or at another"
        return rate_B.sum()
