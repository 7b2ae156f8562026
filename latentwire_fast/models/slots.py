"""Slots that all readers share, and slots that are one reader's own.

A latent of M = 32 with 6 private slots for each of two readers is 20 / 6 / 6: first the shared
ones, then those of each reader in the order of their names. A reader gets the shared slots and its
own, 26 of them; a reader without any gets the shared ones. What is sent is either the whole latent,
for all readers, or what one reader gets, for it alone: fewer bytes. The wire format is the same. A
payload for one reader has another fingerprint, so that no other reader takes it for its own: two
readers' payloads may be of one size.

Shapes: B batch, M latents, d the latent's width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from latentwire_fast.errors import ConfigError, PayloadError
from latentwire_fast.wire import Header

SHARED = ""  # whose a payload is that holds the shared slots alone


@dataclass(frozen=True)
class Slots:
    """How the slots of a latent are shared out.

    Attributes:
        latents: M, all of them.
        private: how many are a reader's own, by its name. Readers that are not here have none.
    """

    latents: int
    private: Mapping[str, int]

    @property
    def shared(self) -> int:
        """How many all readers get."""
        return self.latents - sum(self.private.values())

    def count(self, reader: str) -> int:
        """How many one reader gets."""
        return self.shared + self.private.get(reader, 0)

    def of(self, reader: str, latent_BMd: Tensor) -> Tensor:
        """What one reader gets of latents for all readers; latents that hold just that stay as they
        are.

        Args:
            latent_BMd: or anything else that has a slot in dimension 1.

        Raises:
            ConfigError: so many slots as neither.
        """
        if not self.private or latent_BMd.shape[1] == self.count(reader):
            return latent_BMd
        if latent_BMd.shape[1] != self.latents:
            raise ConfigError(
                f"a latent of {latent_BMd.shape[1]} slots for reader {reader!r}, which reads its "
                f"own {self.count(reader)} or all {self.latents}"
            )
        shared_BSd = latent_BMd[:, : self.shared]
        if reader not in self.private:
            return shared_BSd
        names = sorted(self.private)
        start = self.shared + sum(self.private[name] for name in names[: names.index(reader)])
        return torch.cat([shared_BSd, latent_BMd[:, start : start + self.private[reader]]], 1)

    def owner(self, reader: str) -> str | None:
        """Whose a payload for this reader alone is; None where that is the whole latent."""
        if not self.private:
            return None
        return reader if reader in self.private else SHARED

    def fingerprints(self, model: int) -> dict[str | None, int]:
        """What payloads of each owner are marked with, all of them different.

        Args:
            model: the mark of payloads for all readers, which have the owner None.
        """
        marks: dict[str | None, int] = {None: model}
        for owner in [SHARED, *sorted(self.private)] if self.private else []:
            digest = hashlib.sha256(f"{model}:{owner}".encode()).digest()
            mark = int.from_bytes(digest[:2], "big")
            while mark in marks.values():
                mark = (mark + 1) % 65536
            marks[owner] = mark
        return marks

    def check(
        self,
        headers: Sequence[Header],
        marks: Mapping[int, int],
        *,
        d_z: int,
        reader: str | None,
        fewer: bool = False,
    ) -> None:
        """Raise unless these payloads are of this model, and all for all readers or all for this
        one alone.

        Args:
            marks: by version of the wire format, what the model marks payloads for all readers
                with.
            d_z: the latent's width.
            reader: None where no reader is named.
            fewer: whether a latent for all readers may have fewer slots than M.

        Raises:
            PayloadError: they are not; the message has the index of the first that is not.
        """
        own = {None} if reader is None else {None, self.owner(reader)}
        owners = {
            version: {mark: owner for owner, mark in self.fingerprints(model).items()}
            for version, model in marks.items()
        }
        found: list[str | None] = []
        for i, header in enumerate(headers):
            known = owners[header.version]
            if header.fingerprint not in known:
                raise PayloadError(
                    f"payload {i} was written by model {header.fingerprint:#06x}, this is "
                    f"{marks[header.version]:#06x}; decode it with the model that encoded it"
                )
            owner = known[header.fingerprint]
            found.append(owner)
            if owner not in own:
                raise PayloadError(f"payload {i} {self.refusal(owner, reader)}")
            if owner != found[0]:
                raise PayloadError(
                    f"payload {i} is {_for_whom(owner)}, payload 0 is {_for_whom(found[0])}; "
                    "decode them in two batches"
                )
            latents = self.latents if owner is None else self.count(owner)
            is_fewer = fewer and header.latents < latents
            if header.d_z != d_z or not (is_fewer or header.latents == latents):
                raise PayloadError(
                    f"the payloads hold latents {(header.latents, header.d_z)}, this model's are "
                    f"{(latents, d_z)}"
                )

    def refusal(self, owner: str | None, reader: str | None) -> str:
        """Why a payload of an owner is not for a reader, and what to do."""
        size = self.shared if owner is None else self.count(owner)
        advice = "name the reader that is to decode it"
        if reader is not None:
            advice = f"encode the text for {reader!r}, or for all readers"
        return (
            f"is {_for_whom(owner)}, with {size} of the {self.latents} slots"
            + ("" if reader is None else f", and this is reader {reader!r}")
            + f"; {advice}"
        )


def _for_whom(owner: str | None) -> str:
    if owner is None:
        return "for all readers"
    return f"for reader {owner!r} alone" if owner else "for readers without slots of their own"
