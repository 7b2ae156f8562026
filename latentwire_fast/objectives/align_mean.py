"""A control: every soft token is drawn to the mean of its text's embeddings.

Shapes: B texts, P soft tokens, D the reader's width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from latentwire_fast.config.base import require
from latentwire_fast.config.schema import ObjectiveConfig, RunConfig
from latentwire_fast.objectives.base import Objective
from latentwire_fast.objectives.micro_batch import ReaderBatch
from latentwire_fast.objectives.prepared import PreparedItem
from latentwire_fast.readers.reader import Reader


class AlignMean(Objective):
    """Squared distance of the soft tokens to the mean of the reader's embeddings of the text,
    relative to the mean square of the reader's table.

    A control that the research saw collapse: the means of different texts are nearly the same,
    and all soft tokens are to be that one vector. Beside the answers' loss it did not, at weight
    0.5 (docs/ablations.md).
    """

    counted = "texts"

    @dataclass(frozen=True)
    class Config(ObjectiveConfig):
        """Settings of the alignment: its weight alone."""

        def check(self, run: RunConfig) -> None:
            """Raise unless latents become soft tokens."""
            require(run.gives("prefixes"), f"objective {self.kind!r} needs an attachment 'soft'")

    def prepare(self, prepared: PreparedItem, reader: Reader) -> int:
        """Counts texts."""
        prepared.content_prompt(reader)
        return 1

    def compute(self, batch: ReaderBatch) -> Tensor:
        """The mean distance of a text's soft tokens, summed over texts."""
        reader, soft_BPD = batch.reader, batch.inputs["prefixes"]
        means = [
            reader.embedding(torch.tensor(prompt.ids, device=reader.device)).float().mean(0)
            for prompt in batch.prompts("content")
        ]
        wanted_B1D = torch.stack(means).to(soft_BPD)[:, None]
        error_BPD = (soft_BPD - wanted_B1D) / reader.embedding_rms
        return error_BPD.square().mean((1, 2)).sum()
