"""The base class of bottlenecks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from latentwire_fast.config.schema import BottleneckConfig
from latentwire_fast.wire.header import Header


class Bottleneck(nn.Module):
    """What a latent loses on its way to the receiver: in training by `forward`, on the wire by
    `pack` and `unpack`. Both must lose the same.

    Attributes:
        config: its settings; `config.bits` is the width that is sent unless told otherwise.
        sends_codes: whether `unpack` gives just what `wire.unpack_batch` gives. A receiver then
            sends the codes to the reader's device and unpacks them there; otherwise it calls
            `unpack`.
    """

    Config: ClassVar[type[BottleneckConfig]] = BottleneckConfig
    sends_codes: ClassVar[bool] = False

    def __init__(self, config: BottleneckConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, latent_BMd: Tensor, bits: int) -> Tensor:
        """The latent as the receiver gets it at this width; gradients pass through."""
        raise NotImplementedError

    def pack(self, latent_BMd: Tensor, *, bits: int, fingerprint: int) -> list[bytes]:
        """One payload per latent, made on the latents' device: in the wire format, whose header a
        receiver checks."""
        raise NotImplementedError

    def unpack(
        self, payloads: Sequence[bytes], *, device: torch.device
    ) -> tuple[Tensor, list[Header]]:
        """Latents `[B, M, d_z]` fp32 on a device, and the headers of payloads of one layout.

        Raises:
            PayloadError: bytes that `pack` never writes.
        """
        raise NotImplementedError
