"""The base class of bottlenecks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from latentwire_fast.config.schema import BottleneckConfig
from latentwire_fast.wire.header import VERSION, Header, check_frame


@dataclass(frozen=True)
class Sent:
    """Latents on the receiver's side, in training.

    Attributes:
        latent_BMd: as the receiver gets them; gradients pass through.
        loss_B: by text, what the bottleneck itself asks the training for (the objective
            `commitment`); None where it asks for nothing.
    """

    latent_BMd: Tensor
    loss_B: Tensor | None = None


class Bottleneck(nn.Module):
    """What a latent loses on its way to the receiver: in training by `forward`, on the wire by
    `pack` and `unpack`. Both must lose the same.

    Attributes:
        config: its settings; `config.bits` is the width that is sent unless told otherwise.
        sends_codes: whether for version 1 `unpack` gives just what `wire.unpack_batch` gives. A
            receiver then sends the codes to the reader's device and unpacks them there; otherwise
            it calls `unpack`.
        version: of the wire format that `pack` writes.
    """

    Config: ClassVar[type[BottleneckConfig]] = BottleneckConfig
    sends_codes: bool = False
    version: int = VERSION

    def __init__(self, config: BottleneckConfig) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def build(cls, config: BottleneckConfig, *, latents: int, d_z: int) -> Bottleneck:
        """A fresh one for latents `[B, M, d_z]`."""
        return cls(config)

    def forward(self, latent_BMd: Tensor, bits: int) -> Tensor:
        """The latent as the receiver gets it at this width; gradients pass through."""
        raise NotImplementedError

    def send(self, latent_BMd: Tensor, bits: int) -> Sent:
        """As `forward`, with the bottleneck's own loss."""
        return Sent(self(latent_BMd, bits))

    def rate(self, latent_BMd: Tensor, bits: int) -> Tensor:
        """By text, about how many bits its payload's body takes, with a gradient to the latents
        (the objective `rate`). Only where `measures_rate`."""
        raise NotImplementedError

    @property
    def measures_rate(self) -> bool:
        """Whether it has a `rate`."""
        return False

    @property
    def learns(self) -> bool:
        """Whether it wants `learn` to be called."""
        return type(self).learn is not Bottleneck.learn

    def learn(self, latent_BMd: Tensor, bits: int) -> None:
        """Take in the latents that a training step has sent at this width, after the step. Every
        process does this with those of all processes; nothing here may be random."""

    def describe(self, latent_BMd: Tensor) -> dict[str, Any]:
        """Numbers for the log about what it does to latents; none by default."""
        return {}

    def fit(self, latents: Sequence[Tensor]) -> None:
        """Learn what can be learned once the encoder stays as it is, from latents `[B, M, d]` of
        training texts; nothing by default."""

    @property
    def fits_texts(self) -> int:
        """How many training texts `fit` wants; 0: it has nothing to learn."""
        return 0

    def format_facts(self) -> list[Any]:
        """Numbers and names that a receiver must share, as JSON takes them."""
        return []

    def format_tensors(self) -> dict[str, Tensor]:
        """Tensors that a receiver must share."""
        return {}

    def pack(self, latent_BMd: Tensor, *, bits: int, fingerprint: int) -> list[bytes]:
        """One payload per latent, made on the latents' device: in the wire format, whose header a
        receiver checks."""
        raise NotImplementedError

    def read_header(self, payload: bytes) -> Header:
        """What a payload says of itself, checked but for the values that it carries.

        Raises:
            PayloadError: bytes that are no payload.
        """
        return check_frame(payload)

    def unpack(
        self, payloads: Sequence[bytes], *, device: torch.device
    ) -> tuple[Tensor, list[Header]]:
        """Latents `[B, M, d_z]` fp32 on a device, and the headers of payloads of one layout.

        Raises:
            PayloadError: bytes that `pack` never writes.
        """
        raise NotImplementedError
