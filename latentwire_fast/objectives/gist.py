"""The gist of a text: which tokens are in it, in any order, as the latent alone says.

Shapes: B texts, M latents, d `d_z`, W the head's width, D a reader's, V vocabulary, T tokens of one
text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from latentwire_fast.config.base import require
from latentwire_fast.config.schema import ObjectiveConfig
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.models.layers import pre_norm_layer
from latentwire_fast.objectives.base import Objective
from latentwire_fast.objectives.micro_batch import ReaderBatch
from latentwire_fast.objectives.prepared import PreparedItem
from latentwire_fast.prompts.builder import Prompt
from latentwire_fast.readers.output_head import OutputHead
from latentwire_fast.readers.reader import Reader


class GistHead(nn.Module):
    """A latent to M vectors that a reader's output embedding reads tokens from."""

    def __init__(self, *, d_z: int, d_model: int, width: int, heads: int) -> None:
        super().__init__()
        self.enter = nn.Linear(d_z, width)
        self.mix = pre_norm_layer(width, heads)
        self.leave = nn.Linear(width, d_model)
        self.norm = nn.RMSNorm(d_model)

    def forward(self, latent_BMd: Tensor) -> Tensor:
        """Vectors `[B, M, D]`."""
        vectors_BMD: Tensor = self.norm(self.leave(self.mix(self.enter(latent_BMd))))
        return vectors_BMD


class Gist(Objective):
    """`-log` of the probability of each token of a text, where the probability is the mean over the
    latent's M vectors: each token has to be in one of them, and which one is free.

    Of each text M rows of logits are held at a time, in the backward pass too.
    """

    @dataclass(frozen=True)
    class Config(ObjectiveConfig):
        """Settings of the gist.

        Attributes:
            mask: share of a text's different tokens that are not asked for, drawn anew at each
                step: it should hold whichever are.
            width, heads: of the head, a transformer layer over the latents.
        """

        of_latents: ClassVar[bool] = True
        head_fields: ClassVar[tuple[str, ...]] = ("width", "heads")

        mask: float = 0.25
        width: int = 64
        heads: int = 4

        def __post_init__(self) -> None:
            super().__post_init__()
            self.at_least_one("width", "heads")
            require(
                0 <= self.mask < 1,
                f"objective {self.kind!r}: mask={self.mask}, expected in [0, 1)",
            )
            require(
                self.width % self.heads == 0,
                f"objective {self.kind!r}: width={self.width} does not divide among "
                f"heads={self.heads}",
            )

    config: Config

    @classmethod
    def build_head(
        cls, config: ObjectiveConfig, model: Interlingua, readers: Mapping[str, Reader]
    ) -> nn.Module:
        """One for each reader, to its output embedding."""
        assert isinstance(config, Gist.Config)
        d_z = model.encoder_config.d_z
        return nn.ModuleDict(
            {
                name: GistHead(
                    d_z=d_z, d_model=reader.d_model, width=config.width, heads=config.heads
                )
                for name, reader in readers.items()
            }
        )

    def prepare(self, prepared: PreparedItem, reader: Reader) -> int:
        """Counts tokens; draws which are asked for, one at least."""
        different = sorted(set(prepared.content_prompt(reader).ids))

        def asked() -> Prompt:
            count = max(1, round(len(different) * (1 - self.config.mask)))
            chosen = torch.randperm(len(different))[:count].sort().values.tolist()
            prompt = Prompt()
            prompt.add([different[i] for i in chosen], content=True)
            return prompt

        return len(prepared.prompt(self.config.kind, reader, asked).ids)

    def compute(self, batch: ReaderBatch) -> Tensor:
        """The negative log-probability, summed over tokens."""
        vectors_BMD = self.reader_head(batch.reader.name)(batch.encoded.sent_BMd)
        output_head = batch.reader.output_head
        missing = [
            checkpoint(_missing, output_head, vectors_MD, prompt.ids, use_reentrant=False)
            for vectors_MD, prompt in zip(vectors_BMD, batch.prompts(self.config.kind), strict=True)
        ]
        return torch.stack(missing).sum()


def _missing(head: OutputHead, vectors_MD: Tensor, ids: list[int]) -> Tensor:
    """The negative log-probability of some tokens of one text, summed."""
    log_MV = head.logits(vectors_MD).log_softmax(-1)
    log_MT = log_MV[:, torch.tensor(ids, device=log_MV.device)]
    return (math.log(len(vectors_MD)) - log_MT.logsumexp(0)).sum()
