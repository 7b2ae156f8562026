"""Latent to one reader's input embeddings.

The last stage is `ops.project_calibrate`: a projection whose output has the root mean square of the
reader's own embeddings. An adapter that keeps the latent as it is leaves nothing else to do, so
that a payload's codes can be taken in too.

Shapes: B batch, M latents, d the latent's width, D the reader's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from latentwire_fast import ops
from latentwire_fast.config.parts import check_gain
from latentwire_fast.config.schema import AdapterConfig, AttachmentConfig, Calibration, RunConfig
from latentwire_fast.models.adapters.base import Adapter
from latentwire_fast.models.attachments.base import Attachment, rms_ends, rms_of
from latentwire_fast.readers.card import ReaderCard
from latentwire_fast.registry import ADAPTERS


class SoftPrompt(Attachment):
    """Soft tokens: an adapter, then the calibrated projection into the reader's embeddings.

    Args:
        latents: M, as many soft tokens.
        d_z: width of the latent.
        d_model: width D of the reader's embeddings.
        target_rms: their root mean square.
    """

    @dataclass(frozen=True)
    class Config(AttachmentConfig):
        """Soft tokens in the place of input embeddings.

        Attributes:
            adapter: the latent to what is projected.
            calibration: rescale to the reader's embedding RMS per token, per example or batch, or
                not.
            gain: factor on that RMS.
            tanh: squash the projection into (-1, 1) first.
        """

        adapter: AdapterConfig = field(default_factory=lambda: ADAPTERS.config("mlp"))
        calibration: Calibration = "token"
        gain: float = 1.0
        tanh: bool = False

        def __post_init__(self) -> None:
            super().__post_init__()
            check_gain("gain", self.gain)

        def check(self, run: RunConfig) -> None:
            """Its adapter checks itself."""
            self.adapter.check(run)

    gives = "prefixes"
    varies = True
    config: Config

    def __init__(
        self, config: Config, *, latents: int, d_z: int, d_model: int, target_rms: float
    ) -> None:
        super().__init__(config)
        self.latents = latents
        self.target_rms = target_rms
        self.adapter: Adapter = ADAPTERS.part_of(config.adapter)(
            config.adapter, latents=latents, d_z=d_z, d_model=d_model
        )
        self.weight = nn.Parameter(self.adapter.first_projection())
        self.bias = nn.Parameter(torch.zeros(d_model))
        self.gamma = nn.Parameter(torch.ones(d_model))
        self.beta = nn.Parameter(torch.zeros(d_model))

    @classmethod
    def build(
        cls, config: AttachmentConfig, card: ReaderCard, *, latents: int, d_z: int
    ) -> SoftPrompt:
        """Soft tokens for the reader of a card."""
        assert isinstance(config, SoftPrompt.Config)
        shape = {"latents": latents, "d_z": d_z, "d_model": card.d_model}
        return cls(config, **shape, target_rms=card.embedding_rms)

    @property
    def positions(self) -> int:
        """One per latent."""
        return self.latents

    def forward(
        self, latent_BMd: Tensor, *, gain: float = 1.0, calibration: Calibration | None = None
    ) -> Tensor:
        """Soft tokens `[B, M, D]`.

        Args:
            gain: multiplies the calibrated RMS (prefix gain).
            calibration: instead of the configured one (diagnostics look at `none`).
        """
        projection = self._projection(gain=gain, calibration=calibration)
        return ops.project_calibrate(self.adapter(latent_BMd), **projection)

    @property
    def reads_codes(self) -> bool:
        """Whether `of_codes` is there: nothing comes before the projection."""
        return self.adapter.keeps_latent

    def of_codes(self, codes: Tensor, scales: Tensor, **packing: Any) -> Tensor:
        """`forward` of a latent that `ops.quantize_pack` packed, in the weights' dtype.

        On a GPU the unpacked latent is never written.

        Args:
            codes, scales: of `ops.dequantize_project_calibrate`.
            packing: its `bits`, `group_size` and `shape`.
        """
        assert self.reads_codes
        return ops.dequantize_project_calibrate(codes, scales, **packing, **self._projection())

    def _projection(
        self, *, gain: float = 1.0, calibration: Calibration | None = None
    ) -> dict[str, Any]:
        """Parameters and settings of the projection."""
        norm = self.adapter.norm
        return {
            "weight": self.weight,
            "bias": self.bias,
            "norm_weight": None if norm is None else norm.weight,
            "norm_bias": None if norm is None else norm.bias,
            "gamma": self.gamma,
            "beta": self.beta,
            "target_rms": self.target_rms,
            "gain": self.config.gain * gain,
            "calibration": calibration or self.config.calibration,
            "tanh": self.config.tanh,
        }

    @torch.no_grad()
    def rms(self, latent_BMd: Tensor) -> dict[str, float]:
        """RMS of the soft tokens before and after calibration, and its spread over tokens after."""
        raw_BMD, soft_BMD = self(latent_BMd, calibration="none"), self(latent_BMd)
        return {"pre": rms_of(raw_BMD), "post": rms_of(soft_BMD), **rms_ends(soft_BMD)}
