"""Latent `[B, M, d_z]` to one reader's input embeddings `[B, M, D]`.

Both kinds end in `ops.project_calibrate`: a projection whose output has the root mean square of the
reader's own embeddings.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from latentwire_fast import ops
from latentwire_fast.config import AdapterConfig, Calibration


class Adapter(nn.Module):
    """LayerNorm and projection (`linear`), or a residual 2-layer MLP at the reader's width first
    (`mlp`).

    Args:
        latents: M, the number of slots (each has a learned bias).
        d_z: width of the latent.
        d_model: width D of the reader's embeddings.
        target_rms: the reader's embedding RMS.
    """

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
        linear = self.config.kind == "linear"
        return ops.project_calibrate(
            self.hidden(latent),
            self.weight,
            self.bias,
            norm_weight=self.norm.weight if linear else None,
            norm_bias=self.norm.bias if linear else None,
            gamma=self.gamma,
            beta=self.beta,
            target_rms=self.target_rms,
            gain=self.config.gain * gain,
            calibration=calibration or self.config.calibration,
            tanh=self.config.tanh,
        )

    @torch.no_grad()
    def rms(self, latent: Tensor) -> dict[str, float]:
        """RMS of the prefix before and after calibration."""
        outputs = {"pre": self(latent, calibration="none"), "post": self(latent)}
        return {name: rms_of(value) for name, value in outputs.items()}


def rms_of(tensor: Tensor) -> float:
    """Root mean square over all elements."""
    return tensor.float().pow(2).mean().sqrt().item()
