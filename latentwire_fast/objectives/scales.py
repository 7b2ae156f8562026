"""Soft tokens stay as they were calibrated: L2 on the learned scale and shift of their channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from latentwire_fast.config.base import require
from latentwire_fast.config.schema import ObjectiveConfig, RunConfig
from latentwire_fast.models.attachments.soft import SoftPrompt
from latentwire_fast.objectives.base import Objective
from latentwire_fast.objectives.micro_batch import ReaderBatch
from latentwire_fast.objectives.prepared import PreparedItem
from latentwire_fast.readers.reader import Reader
from latentwire_fast.registry import ATTACHMENTS


class Scales(Objective):
    """Mean square over channels of `gamma - 1` and of `beta` relative to the embeddings' RMS.

    `gamma` and `beta` come behind the calibration, so without this they may undo it.
    """

    @dataclass(frozen=True)
    class Config(ObjectiveConfig):
        """Settings of the penalty: its weight alone."""

        takes_chunks: ClassVar[bool] = True
        takes_fewer: ClassVar[bool] = True

        def check(self, run: RunConfig) -> None:
            """Raise unless the run has soft tokens with a scale and a shift."""
            parts = map(ATTACHMENTS.part_of, run.attachments)
            require(
                any(issubclass(part, SoftPrompt) for part in parts),
                f"objective {self.kind!r} needs an attachment 'soft' or 'soft_matched'",
            )

    counted = "texts"

    def prepare(self, prepared: PreparedItem, reader: Reader) -> int:
        """Counts texts, to each of which the penalty is the same."""
        return 1

    def compute(self, batch: ReaderBatch) -> Tensor:
        """The penalty, once for each text."""
        total = torch.zeros((), device=batch.encoded.sent_BMd.device)
        for part in self.model.parts(batch.reader.name).values():
            if isinstance(part, SoftPrompt):
                shift_D = part.beta / part.target_rms
                total = total + (part.gamma - 1).square().mean() + shift_D.square().mean()
        return len(batch.items) * total
