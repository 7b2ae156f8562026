"""Latent `[B, M, d_z]` to one reader's input embeddings `[B, M, D]`.

Both kinds end in `ops.project_calibrate`: a projection whose output has the root mean square of the
reader's own embeddings. The linear kind is nothing else, and can take a payload's codes too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from latentwire_fast import ops
from latentwire_fast.config.schema import AdapterConfig, Calibration


class Adapter(nn.Module):
    """LayerNorm and projection (`linear`), or a residual 2-layer MLP at the reader's width first
    (`mlp`).

    Args:
        latents: M, the number of slots (each has a learned bias).
        d_z: width of the latent.
        d_model: width D of the reader's embeddings.
        target_rms: the reader's embedding RMS.
    """

    table_parameters = ("slots",)

    def __init__(
        self, config: AdapterConfig, *, latents: int, d_z: int, d_model: int, target_rms: float
    ) -> None:
        super().__init__()
        self.config = config
        self.target_rms = target_rms
        if config.kind == "mlp":
            self.lift = nn.Linear(d_z, d_model)
            self.slots = nn.Parameter(torch.randn(latents, d_model) * 0.02)
            self.up = nn.Linear(d_model, config.expansion * d_model)
            self.down = nn.Linear(config.expansion * d_model, d_model)
            self.dropout = nn.Dropout(config.dropout)
            self.weight = nn.Parameter(torch.eye(d_model))
        else:
            self.norm = nn.LayerNorm(d_z)
            self.weight = nn.Parameter(torch.randn(d_model, d_z) * d_z**-0.5)
        self.bias = nn.Parameter(torch.zeros(d_model))
        self.gamma = nn.Parameter(torch.ones(d_model))
        self.beta = nn.Parameter(torch.zeros(d_model))

    def hidden(self, latent: Tensor) -> Tensor:
        """What is normalised and projected: `[B, M, d_z]` (linear) or `[B, M, D]` (mlp)."""
        if self.config.kind == "linear":
            return latent
        lifted = self.lift(latent) + self.slots
        return lifted + self.dropout(self.down(nn.functional.silu(self.up(lifted))))

    def forward(
        self, latent: Tensor, *, gain: float = 1.0, calibration: Calibration | None = None
    ) -> Tensor:
        """Prefix embeddings `[B, M, D]`.

        Args:
            gain: multiplies the calibrated RMS (prefix gain).
            calibration: instead of the configured one (diagnostics look at `none`).
        """
        return ops.project_calibrate(
            self.hidden(latent), **self._projection(gain=gain, calibration=calibration)
        )

    @property
    def reads_codes(self) -> bool:
        """Whether `of_codes` is there: nothing comes before the projection."""
        return self.config.kind == "linear"

    def of_codes(
        self,
        codes: Tensor,
        scales: Tensor,
        *,
        bits: int,
        group_size: int,
        shape: tuple[int, int, int],
    ) -> Tensor:
        """`forward` of a latent that `ops.quantize_pack` packed, in the weights' dtype.

        On a GPU the unpacked latent is never written.

        Args:
            codes, scales, bits, group_size: of `ops.dequantize_project_calibrate`.
            shape: of the latent, `(B, M, d_z)`.
        """
        assert self.reads_codes
        packing: dict[str, Any] = {"bits": bits, "group_size": group_size, "shape": shape}
        return ops.dequantize_project_calibrate(codes, scales, **packing, **self._projection())

    def _projection(
        self, *, gain: float = 1.0, calibration: Calibration | None = None
    ) -> dict[str, Any]:
        """Parameters and settings of the projection."""
        linear = self.config.kind == "linear"
        return {
            "weight": self.weight,
            "bias": self.bias,
            "norm_weight": self.norm.weight if linear else None,
            "norm_bias": self.norm.bias if linear else None,
            "gamma": self.gamma,
            "beta": self.beta,
            "target_rms": self.target_rms,
            "gain": self.config.gain * gain,
            "calibration": calibration or self.config.calibration,
            "tanh": self.config.tanh,
        }

    @torch.no_grad()
    def rms(self, latent: Tensor) -> dict[str, float]:
        """RMS of the prefix before and after calibration."""
        outputs = {"pre": self(latent, calibration="none"), "post": self(latent)}
        return {name: rms_of(value) for name, value in outputs.items()}


def rms_of(tensor: Tensor) -> float:
    """Root mean square over all elements."""
    return tensor.float().pow(2).mean().sqrt().item()
