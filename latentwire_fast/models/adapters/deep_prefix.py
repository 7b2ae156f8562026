"""Latent `[B, M, d_z]` to a deep prefix: keys and values for every layer of one reader.

    geometry = reader.kv_geometry
    deep = DeepPrefix(AdapterConfig(prefix="deep"), latents=12, d_z=16, geometry=geometry)
    reader.collate(prompts, deep_L2BHPD=deep(latent_BMd))

A soft token has to make its way through the reader's first layers; a deep prefix tells each layer
directly what it would have found there (prefix tuning, arXiv:2101.00190, with the prefix generated
from a payload). `kv_cache.py` puts it into a cache.

Shapes: L layers, 2 keys and values, B batch, H key/value heads, P = M positions, D head width, W
width of the generator.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from latentwire_fast import ops
from latentwire_fast.config.schema import AdapterConfig
from latentwire_fast.models.layers import pre_norm_layer
from latentwire_fast.readers.kv_geometry import KVGeometry


class DeepPrefix(nn.Module):
    """Residual MLP on each latent, a transformer over the slots, then one projection per layer to
    `H x D` keys and values, all in one `ops.project_calibrate` with a group for each.

    Attention over the slots lets one say what several latents hold together, so that the code may
    be spread over them. Loss on the testbed's context mode (one seed, up to 2 facts) after 200 and
    300 steps: 2.0 and 1.0 with both, 2.6 and 1.6 with the MLP alone, 2.7 after 200 with the
    transformer alone.

    The keys are what the cache holds, rotary positions included, so each of the M slots has its own
    place among the reader's positions 0 to M - 1.

    Args:
        latents: M, the number of slots (each has a learned bias).
        d_z: width of the latent.
    """

    def __init__(
        self, config: AdapterConfig, *, latents: int, d_z: int, geometry: KVGeometry
    ) -> None:
        super().__init__()
        self.geometry = geometry
        width = config.deep_width
        self.lift = nn.Linear(d_z, width)
        self.slots = nn.Parameter(torch.randn(latents, width) * 0.5)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, config.expansion * width)
        self.down = nn.Linear(config.expansion * width, width)
        self.dropout = nn.Dropout(config.dropout)
        self.body = nn.TransformerEncoder(
            pre_norm_layer(
                width, config.deep_heads, expansion=config.expansion, dropout=config.dropout
            ),
            config.deep_layers,
            norm=nn.LayerNorm(width),
            enable_nested_tensor=False,
        )
        # All layers in one matmul; rows are (layer, key or value, head, channel).
        rows = geometry.layers * 2 * geometry.heads * geometry.head_width
        self.project = nn.Linear(width, rows)
        nn.init.normal_(self.project.weight, std=width**-0.5)
        nn.init.zeros_(self.project.bias)
        self.gain = nn.Parameter(torch.tensor(geometry.rms))
        self.calibration = config.deep_calibration

    def forward(self, latent_BMd: Tensor, *, gain: float = 1.0) -> Tensor:
        """Keys and values `[L, 2, B, H, M, D]`, in the generator's dtype.

        Args:
            gain: multiplies the values (prefix gain); the keys, and so the attention, stay.
        """
        g = self.geometry
        lifted_BMW = self.lift(latent_BMd) + self.slots
        inner = nn.functional.silu(self.up(self.norm(lifted_BMW)))
        hidden_BMW = lifted_BMW + self.dropout(self.down(inner))
        # No tensor of Python numbers: a copy from the host, which a graph capture forbids.
        scale_L2 = torch.stack([self.gain[:, 0], gain * self.gain[:, 1]], 1)
        made = ops.project_calibrate(
            _as_autocast(self.body(hidden_BMW)),
            *(self.project.weight, self.project.bias),
            target_rms=1.0,
            gain=scale_L2.flatten(),
            calibration=self.calibration,
            groups=2 * g.layers,
        )
        return made.unflatten(-1, (g.layers, 2, g.heads, g.head_width)).permute(2, 3, 0, 4, 1, 5)


def _as_autocast(x: Tensor) -> Tensor:
    """In the dtype that a Linear would multiply in: a LayerNorm leaves fp32, an op takes what it
    gets."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
