"""Payloads on their way to the device: frames checked on the host, values unpacked on the device.

Values that are not the latent's own codes are unpacked by the bottleneck that made them, before
they go to the reader's device.

Shapes: R payloads, M latents, d latent width, c code bytes, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from latentwire_fast import wire
from latentwire_fast.errors import PayloadError
from latentwire_fast.serving.input_buffer import Fields
from latentwire_fast.wire.header import Header, check_frame, located
from latentwire_fast.wire.payload import split_bodies


@dataclass(frozen=True)
class Parcel:
    """Payloads of one layout whose header, length and CRC are correct.

    Attributes:
        header: of each.
        payloads: R of them.
        latent_RMd: fp32 latents, where a bottleneck has unpacked them; else None.
    """

    header: Header
    payloads: Sequence[bytes]
    latent_RMd: Tensor | None = None

    @property
    def fields(self) -> Fields:
        """What an input buffer needs for them: the latents, or codes and scales. At 16 bits the
        codes are the values themselves, and there are no scales."""
        if self.latent_RMd is not None:
            return {"latent": (torch.float32, tuple(self.latent_RMd.shape))}
        rows = len(self.payloads)
        return {
            "codes": (torch.uint8, (rows, self.header.code_bytes)),
            "scales": (torch.float16, (rows, self.header.groups)),
        }

    def values(self) -> dict[str, np.ndarray]:
        """The latents, or the bytes as they came, cut in two."""
        if self.latent_RMd is not None:
            return {"latent": self.latent_RMd.float().cpu().numpy()}
        codes_Rc, scales_RG = split_bodies(self.payloads, self.header)
        return {"codes": codes_Rc, "scales": scales_RG}

    def with_rows(self, rows: int) -> Parcel:
        """With so many payloads: the last one again in the place of those that are added. One that
        all prompts read stays one."""
        if len(self.payloads) == 1:
            return self
        added = rows - len(self.payloads)
        payloads, latent_RMd = [*self.payloads, *[self.payloads[-1]] * added], self.latent_RMd
        if latent_RMd is not None:
            latent_RMd = torch.cat([latent_RMd, latent_RMd[-1:].expand(added, -1, -1)])
        return Parcel(self.header, payloads, latent_RMd)

    def verify(self) -> None:
        """Check every value, as unpacking on the host does.

        Raises:
            PayloadError: values that no encoder sends.
        """
        if self.latent_RMd is None:
            wire.unpack_batch(self.payloads)


@dataclass(frozen=True)
class PayloadKind:
    """The kind of payloads that a receiver was made for.

    Attributes:
        unpack: payloads to latents `[R, M, d]` fp32 and headers, all checked, where their values
            are not the latent's own codes; None where they are, and the reader's device unpacks
            them.
    """

    latents: int
    d_z: int
    fingerprint: int
    unpack: Callable[[Sequence[bytes]], tuple[Tensor, Sequence[Header]]] | None = None

    def open(self, payloads: Sequence[bytes]) -> Parcel:
        """Check everything about payloads but the values that they carry.

        Raises:
            PayloadError: none; bytes that are no payload; one of another model, of another shape or
                of another precision than the first (the message has its index).
        """
        if not payloads:
            raise PayloadError("no payloads to read; give at least one")
        if self.unpack is not None:
            latent_RMd, opened = self.unpack(payloads)
            return Parcel(opened[0], payloads, latent_RMd)
        headers = []
        for i, payload in enumerate(payloads):
            with located(f"payload {i}"):
                headers.append(check_frame(payload))
                self._check(headers[i], headers[0])
        return Parcel(headers[0], payloads)

    def _check(self, header: Header, first: Header) -> None:
        if header.fingerprint != self.fingerprint:
            raise PayloadError(
                f"it was written by model {header.fingerprint:#06x}, this receiver reads "
                f"{self.fingerprint:#06x}; decode it with the model that encoded it"
            )
        if (header.latents, header.d_z) != (self.latents, self.d_z):
            raise PayloadError(
                f"it holds a latent ({header.latents}, {header.d_z}), this receiver reads "
                f"({self.latents}, {self.d_z})"
            )
        if header != first:
            raise PayloadError(
                f"it has {header.bits} bits in groups of {header.group_size}, payload 0 has "
                f"{first.bits} in groups of {first.group_size}; read them in two batches"
            )
