"""Uniform steps per group of values: fp16 at 16 bits, else codes with one fp16 scale per group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from latentwire_fast import ops, wire
from latentwire_fast.config.base import require
from latentwire_fast.config.schema import BottleneckConfig
from latentwire_fast.models.bottlenecks.base import Bottleneck
from latentwire_fast.wire.header import Header


class UniformQuantizer(Bottleneck):
    """Groups of consecutive values that share a scale (`docs/wire_format.md`). Nothing is
    learned."""

    @dataclass(frozen=True)
    class Config(BottleneckConfig):
        """Uniform steps per group of values.

        Attributes:
            group_size: values that share a scale.
        """

        group_size: int = 32

        def __post_init__(self) -> None:
            super().__post_init__()
            require(
                self.group_size in ops.GROUP_SIZES, f"group_size={self.group_size}: 16, 32 or 64"
            )

    config: Config
    sends_codes = True

    def forward(self, latent_BMd: Tensor, bits: int) -> Tensor:
        """The latent as the receiver gets it at this width; gradients pass straight through."""
        if bits == 16:
            return latent_BMd + (latent_BMd.half().float() - latent_BMd).detach()
        return ops.fake_quantize(latent_BMd, bits=bits, group_size=self.config.group_size)

    def pack(self, latent_BMd: Tensor, *, bits: int, fingerprint: int) -> list[bytes]:
        """One payload per latent, made on the latents' device.

        Raises:
            PayloadError: as `wire.pack`.
        """
        group_size = self.config.group_size
        return wire.pack_batch(
            latent_BMd, bits=bits, group_size=group_size, fingerprint=fingerprint
        )

    def unpack(
        self, payloads: Sequence[bytes], *, device: torch.device
    ) -> tuple[Tensor, list[Header]]:
        """Latents `[B, M, d_z]` fp32 on a device, and the headers of payloads of one layout.

        Raises:
            PayloadError: as `wire.unpack_batch`.
        """
        return wire.unpack_batch(payloads, device=device)
