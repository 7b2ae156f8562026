"""Diversity: a penalty on latents that are alike.

Shapes: B texts, M latents, d `d_z`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from latentwire_fast.config.base import require
from latentwire_fast.config.schema import ObjectiveConfig
from latentwire_fast.objectives.base import Objective
from latentwire_fast.objectives.micro_batch import ReaderBatch
from latentwire_fast.objectives.prepared import PreparedItem
from latentwire_fast.readers.reader import Reader


class Diversity(Objective):
    """A penalty on the latents of a micro-batch, whichever readers there are.

    `texts`: the mean squared cosine between the vectors of other texts in the same slot.
    `slots`: the same between the slots of one text.
    `covariance`: as VICReg (Bardes et al. 2022), per slot and over texts: how far each channel's
    standard deviation is below `std`, and `covariance` times the squared covariances between
    channels, divided by d.

    It says that latents have to differ, not that they have to say something: noise satisfies it.
    """

    counted = "texts"
    once = True

    @dataclass(frozen=True)
    class Config(ObjectiveConfig):
        """Settings of the penalty.

        Attributes:
            form: see the class.
            std: of the form `covariance`. The vectors have a root mean square of 1, so that 1 is
                the most there is.
            covariance: weight of the covariances.
        """

        of_latents: ClassVar[bool] = True

        form: Literal["texts", "slots", "covariance"] = "texts"
        std: float = 0.5
        covariance: float = 0.04

        @property
        def compares_texts(self) -> bool:
            """Unless it compares the slots of one."""
            return self.form != "slots"

        def __post_init__(self) -> None:
            super().__post_init__()
            require(
                0 < self.std <= 1, f"objective {self.kind!r}: std={self.std}, expected in (0, 1]"
            )
            require(
                self.covariance >= 0,
                f"objective {self.kind!r}: covariance={self.covariance}, expected at least 0",
            )

    config: Config

    def prepare(self, prepared: PreparedItem, reader: Reader) -> int:
        """Counts texts."""
        return 1

    def compute(self, batch: ReaderBatch) -> Tensor:
        """The penalty, summed over texts; 0 where there is nothing to differ from."""
        latent_BMd = batch.encoded.sent_BMd.float()
        if self.config.form == "covariance":
            return len(latent_BMd) * self._covariance(latent_BMd)
        unit_BMd = F.normalize(latent_BMd, dim=-1)
        if self.config.form == "slots":
            return _squared_cosines(unit_BMd).mean(1).sum()
        texts = [(prepared.item.context, prepared.question) for prepared in batch.items]
        same_BB = torch.tensor([[a == b for b in texts] for a in texts], device=unit_BMd.device)
        return _squared_cosines(unit_BMd.transpose(0, 1), same=same_BB).mean(0).sum()

    def _covariance(self, latent_BMd: Tensor) -> Tensor:
        """Of the channels over texts, the mean over slots."""
        count, _, width = latent_BMd.shape
        centred_MBd = (latent_BMd - latent_BMd.mean(0)).transpose(0, 1)
        covariance_Mdd = centred_MBd.mT @ centred_MBd / max(1, count - 1)
        variance_Md = covariance_Mdd.diagonal(dim1=1, dim2=2)
        missing_Md = (self.config.std - (variance_Md + 1e-4).sqrt()).clamp(min=0)
        if count == 1:  # one text says nothing of how texts vary
            return 0 * missing_Md.mean()
        others_M = covariance_Mdd.square().sum((1, 2)) - variance_Md.square().sum(1)
        return missing_Md.mean() + self.config.covariance * others_M.mean() / width


def _squared_cosines(unit_GNd: Tensor, *, same: Tensor | None = None) -> Tensor:
    """Of each of N unit vectors of a group, the mean squared cosine `[G, N]` with the others.

    Args:
        same: `[N, N]`, which of them are no others; None: each only itself.
    """
    if same is None:
        same = torch.eye(unit_GNd.shape[1], dtype=torch.bool, device=unit_GNd.device)
    squares_GNN = (unit_GNd @ unit_GNd.mT).square() * ~same
    return squares_GNN.sum(-1) / (~same).sum(-1).clamp(min=1)
