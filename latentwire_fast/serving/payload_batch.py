"""Payloads on their way to the device: frames checked on the host, values unpacked on the device.

Values that are not the latent's own codes are unpacked by the bottleneck that made them, before
they go to the reader's device.

A prompt may be about several payloads, which stand one behind the other in its text's place. Here
they are a message.

Shapes: R payloads of all messages, M latents, d latent width, c code bytes, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import cast

import numpy as np
import torch
from torch import Tensor

from latentwire_fast import wire
from latentwire_fast.errors import PayloadError
from latentwire_fast.models.codec import LatentCodec
from latentwire_fast.models.joined import Pieces
from latentwire_fast.models.slots import Slots
from latentwire_fast.serving.input_buffer import Fields
from latentwire_fast.wire.header import Header, check_frame, located
from latentwire_fast.wire.payload import split_bodies

# What one prompt is about: a payload, or several in their order.
Message = bytes | Sequence[bytes]


# Payloads to latents `[R, M, d]` fp32 and headers, all checked.
Unpack = Callable[[Sequence[bytes]], tuple[Tensor, Sequence[Header]]]


def payloads_of(message: Message) -> Sequence[bytes]:
    """The payloads of a message."""
    return [message] if isinstance(message, bytes) else message


@dataclass(frozen=True)
class Parcel:
    """Payloads of one layout whose header, length and CRC are correct.

    Attributes:
        header: of each.
        payloads: R of them, those of a message one behind the other.
        pieces: how many there are in each message.
        latent_RMd: fp32 latents, where a bottleneck has unpacked them; else None.
    """

    header: Header
    payloads: Sequence[bytes]
    pieces: Pieces
    latent_RMd: Tensor | None = None

    @property
    def latents(self) -> int:
        """M of the tensors that the payloads become."""
        if self.pieces.slots is None:
            return self.header.latents
        assert self.latent_RMd is not None
        return self.latent_RMd.shape[1]

    @property
    def messages(self) -> int:
        """How many there are: one that all prompts read, or one for each."""
        return len(self.pieces.per_prompt)

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
        """With so many messages: the last one again in the place of those that are added. One that
        all prompts read stays one."""
        if self.messages == 1:
            return self
        added = rows - self.messages
        last, latent_RMd = self.pieces.rows[-1], self.latent_RMd
        payloads = [*self.payloads, *[self.payloads[r] for r in last] * added]
        if latent_RMd is not None:
            latent_RMd = torch.cat([latent_RMd, latent_RMd[last.start :].repeat(added, 1, 1)])
        pieces = self.pieces.of([*range(self.messages), *[self.messages - 1] * added])
        return Parcel(self.header, payloads, pieces, latent_RMd)

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
        slots, reader: how the latent's slots are shared out among readers, and which of them this
            receiver reads for; None where all readers get all of them.
        decode: as `unpack`, for payloads with any number of latents up to `latents`: zeros stand
            behind these; None where all payloads have `latents`.
    """

    latents: int
    d_z: int
    fingerprint: int
    unpack: Unpack | None = None
    slots: Slots | None = None
    reader: str = ""
    decode: Unpack | None = None

    @classmethod
    def of(cls, model: LatentCodec, reader: str, *, unpacked: bool = False) -> PayloadKind:
        """The kind that `model` writes, for one of its readers.

        Args:
            unpacked: the bottleneck unpacks them, also where the reader's device could.
        """
        encoder, bottleneck = model.encoder_config, model.bottleneck
        sends_codes = bottleneck.sends_codes and bottleneck.version == wire.VERSION
        opened = partial(model.open_payloads, reader=reader)
        return cls(
            encoder.latents,
            encoder.d_z,
            model.fingerprint,
            unpack=None if sends_codes and not unpacked else opened,
            slots=model.slots if model.slots.private else None,
            reader=reader,
            decode=opened if encoder.varies else None,
        )

    @property
    def view(self) -> Callable[[Tensor], Tensor] | None:
        """What the reader gets of latents; None for all of them."""
        return None if self.slots is None else partial(self.slots.of, self.reader)

    @cached_property
    def _owners(self) -> dict[int, str | None]:
        """Whose payloads are (`Slots.owner`), by their fingerprint."""
        if self.slots is None:
            return {self.fingerprint: None}
        marks = self.slots.fingerprints(self.fingerprint)
        return {mark: owner for owner, mark in marks.items()}

    def open(self, messages: Sequence[Message]) -> Parcel:
        """Check everything about payloads but the values that they carry.

        Raises:
            PayloadError: none; bytes that are no payload; one of another model, of another shape or
                of another precision than the first (the text says which it is).
        """
        if not messages:
            raise PayloadError("no payloads to read; give at least one")
        places, payloads = _flat(messages)
        headers: list[Header] = []
        latent_RMd: Tensor | None = None
        if self.unpack is not None:
            latent_RMd, found = self.unpack(payloads)
            headers = [*found]
        for place, payload in zip(places, payloads, strict=True):
            with located(place):
                if self.unpack is None:
                    headers.append(check_frame(payload))
                    self._check(headers[-1])
        for place, header in zip(places, headers, strict=True):
            with located(place):
                _check_alike(header, headers[0])
        counts = tuple(len(payloads_of(message)) for message in messages)
        latents = tuple(header.latents for header in headers)
        if len({*latents}) == 1:
            if latent_RMd is not None:
                latent_RMd = latent_RMd[:, : latents[0]]
            return Parcel(headers[0], payloads, Pieces(counts), latent_RMd)
        if latent_RMd is None:
            assert self.decode is not None
            latent_RMd, _ = self.decode(payloads)
        return Parcel(headers[0], payloads, Pieces(counts, latents), latent_RMd)

    def _check(self, header: Header) -> None:
        if header.fingerprint not in self._owners:
            raise PayloadError(
                f"it was written by model {header.fingerprint:#06x}, this receiver reads "
                f"{self.fingerprint:#06x}; decode it with the model that encoded it"
            )
        latents = self._latents_of(self._owners[header.fingerprint])
        is_fewer = self.decode is not None and header.latents < latents
        if header.d_z != self.d_z or not (is_fewer or header.latents == latents):
            raise PayloadError(
                f"it holds a latent ({header.latents}, {header.d_z}), this receiver reads "
                f"({latents}, {self.d_z})"
            )

    def _latents_of(self, owner: str | None) -> int:
        """How many slots payloads of an owner hold.

        Raises:
            PayloadError: they are for another reader.
        """
        if owner is None or self.slots is None:
            return self.latents
        if owner != self.slots.owner(self.reader):
            raise PayloadError(f"it {self.slots.refusal(owner, self.reader)}")
        return self.slots.count(self.reader)


def _flat(messages: Sequence[Message]) -> tuple[list[str], list[bytes]]:
    """All payloads of messages, and what a message of an error calls each of them.

    Raises:
        PayloadError: a message without payloads.
    """
    places: list[str] = []
    payloads: list[bytes] = []
    for i, message in enumerate(messages):
        if not isinstance(message, list | tuple):
            places.append(f"payload {i}")
            payloads.append(cast(bytes, message))
            continue
        if not message:
            raise PayloadError(f"prompt {i} has no payloads; give it at least one")
        places += [f"payload {j} of prompt {i}" for j in range(len(message))]
        payloads += message
    return places, payloads


def _check_alike(header: Header, first: Header) -> None:
    """Raise unless one batch can have both.

    Raises:
        PayloadError: they are of different owners, or of different precision.
    """
    if header.fingerprint != first.fingerprint:
        raise PayloadError(
            "one of it and payload 0 is for all readers, the other for this one alone; read "
            "them in two batches"
        )
    if (header.bits, header.group_size) != (first.bits, first.group_size):
        raise PayloadError(
            f"it has {header.bits} bits in groups of {header.group_size}, payload 0 has "
            f"{first.bits} in groups of {first.group_size}; read them in two batches"
        )
