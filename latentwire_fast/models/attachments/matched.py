"""Soft tokens whose channels have the mean and the spread of the reader's own embeddings.

The calibrations of `soft` give soft tokens the size of embeddings; this gives every channel the
first two moments that it has over the reader's vocabulary (the seeds' `batch_dist`).

Shapes: B batch, M latents, d the latent's width, D the reader's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from latentwire_fast import ops
from latentwire_fast.config.base import require
from latentwire_fast.config.schema import Calibration, Mode
from latentwire_fast.models.attachments.base import rms_ends, rms_of
from latentwire_fast.models.attachments.soft import SoftPrompt
from latentwire_fast.readers.embeddings import channel_moments
from latentwire_fast.readers.reader import Reader


class MatchedSoftPrompt(SoftPrompt):
    """`soft` with batch normalisation behind it: in training by the statistics of the micro-batch,
    else by their running means, so that an answer does not depend on what is asked beside it.

    Args: those of `SoftPrompt`.
    """

    @dataclass(frozen=True)
    class Config(SoftPrompt.Config):
        """Soft tokens with the moments of the reader's embeddings, channel by channel.

        Attributes:
            momentum: share of the running means that each training step renews.
        """

        calibration: Calibration = "none"
        momentum: float = 0.1

        def __post_init__(self) -> None:
            super().__post_init__()
            require(
                self.calibration == "none",
                f"attachment {self.kind!r}: calibration={self.calibration!r}, expected 'none': its "
                "channels are scaled one by one",
            )
            require(0 < self.momentum <= 1, f"momentum={self.momentum}, expected in (0, 1]")

    config: Config
    varies = False  # its statistics would be of padding too

    def __init__(
        self, config: Config, *, latents: int, d_z: int, d_model: int, target_rms: float
    ) -> None:
        super().__init__(config, latents=latents, d_z=d_z, d_model=d_model, target_rms=target_rms)
        self.normed = nn.BatchNorm1d(d_model, affine=False, momentum=config.momentum)
        self.mean_D: Tensor
        self.std_D: Tensor
        self.register_buffer("mean_D", torch.zeros(d_model))
        self.register_buffer("std_D", torch.full((d_model,), target_rms))

    @torch.no_grad()
    def start(self, reader: Reader, *, mode: Mode, contexts: Sequence[str]) -> None:
        """Take the moments of the reader's embeddings."""
        mean_D, std_D = channel_moments(reader.embedding)
        self.mean_D.copy_(mean_D)
        self.std_D.copy_(std_D)

    @property
    def reads_codes(self) -> bool:
        """No: something comes behind the projection."""
        return False

    def forward(
        self, latent_BMd: Tensor, *, gain: float = 1.0, calibration: Calibration | None = None
    ) -> Tensor:
        """Soft tokens `[B, M, D]`: `gamma * matched + beta`, times the gain.

        Args:
            calibration: of no effect: matching takes its place.
        """
        raw_BMD = self._raw(latent_BMd)
        normed_BMD = self.normed(raw_BMD.to(self.mean_D).flatten(0, 1)).view_as(raw_BMD)
        matched_BMD = normed_BMD * self.std_D + self.mean_D
        return (self.config.gain * gain * (self.gamma * matched_BMD + self.beta)).to(raw_BMD.dtype)

    def _raw(self, latent_BMd: Tensor) -> Tensor:
        projection = self._projection(calibration="none") | {"gain": 1.0}
        return ops.project_calibrate(
            self.adapter(latent_BMd), **projection | {"gamma": None, "beta": None}
        )

    @torch.no_grad()
    def rms(self, latent_BMd: Tensor) -> dict[str, float]:
        """RMS of the soft tokens before and after matching; leaves the running means alone."""
        was_training = self.normed.training
        self.normed.eval()
        try:
            raw_BMD, soft_BMD = self._raw(latent_BMd), self(latent_BMd)
            return {"pre": rms_of(raw_BMD), "post": rms_of(soft_BMD), **rms_ends(soft_BMD)}
        finally:
            self.normed.train(was_training)
