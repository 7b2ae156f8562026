"""Encoder and bottleneck: texts to latents, latents to payloads and back. No reader is needed.

Shapes: B batch, M latents, d the latent's width; R payloads of all texts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from itertools import repeat
from typing import cast

import torch
from torch import Tensor, nn

from latentwire_fast.config.schema import BottleneckConfig, EncoderConfig, Mode
from latentwire_fast.errors import ConfigError
from latentwire_fast.files.tensors import parameter_digest
from latentwire_fast.models.bottlenecks.base import Bottleneck
from latentwire_fast.models.encoders.base import Encoder
from latentwire_fast.models.encoders.chunks import Chunks, chunks_of
from latentwire_fast.models.poolers.base import Selection
from latentwire_fast.models.ragged import pack_ragged, unpack_ragged
from latentwire_fast.models.slots import Slots
from latentwire_fast.readers.card import ReaderCard
from latentwire_fast.registry import BOTTLENECKS
from latentwire_fast.wire.header import Header, located


class LatentCodec(nn.Module):
    """What writes payloads, and reads them back as latents: `Interlingua` without its readers'
    parts.

    Args:
        encoder, readers, bottleneck, mode, private_slots: as in `Interlingua`.

    Attributes:
        cards: of the readers, by name.
        slots: which of a latent's slots each reader gets.
    """

    def __init__(
        self,
        encoder: Encoder,
        readers: Mapping[str, ReaderCard],
        *,
        bottleneck: BottleneckConfig,
        mode: Mode,
        private_slots: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.mode: Mode = mode
        self.cards = dict(readers)
        self.encoder = encoder
        self.slots = Slots(encoder.config.latents, dict(private_slots or {}))
        shape = {"latents": encoder.config.latents, "d_z": encoder.config.d_z}
        self.bottleneck: Bottleneck = BOTTLENECKS.part_of(bottleneck).build(bottleneck, **shape)

    def check_name(self, reader: str) -> None:
        """Raise unless adapters were trained for a reader of that name.

        Raises:
            ConfigError: none were.
        """
        if reader not in self.cards:
            raise ConfigError(f"no adapter for reader {reader!r}; there are {sorted(self.cards)}")

    @property
    def encoder_config(self) -> EncoderConfig:
        """The encoder's settings."""
        return self.encoder.config

    @property
    def bottleneck_config(self) -> BottleneckConfig:
        """The bottleneck's settings."""
        return self.bottleneck.config

    def encode(self, contexts: Sequence[str], questions: Sequence[str] | None = None) -> Tensor:
        """Latents `[B, M, d_z]` fp32, unquantised. Pure mode needs the questions, context mode
        refuses.

        Raises:
            ConfigError: no list of texts; questions given or missing against the mode, or not one
                for each context.
        """
        self._check_texts(contexts, questions)
        return self.encoder(contexts, questions)

    def select(
        self, contexts: Sequence[str], questions: Sequence[str] | None = None
    ) -> tuple[Tensor, Selection]:
        """Latents `[B, M, d_z]` and the positions that they stand at (`Encoder.select`).

        Raises:
            ConfigError: as `encode`, or the encoder selects no positions.
        """
        self._check_texts(contexts, questions)
        return self.encoder.select(contexts, questions)

    def cut(
        self,
        contexts: Sequence[str],
        questions: Sequence[str] | None = None,
        *,
        length: int | None = None,
    ) -> Chunks:
        """Contexts in chunks of at most `length`, in the encoder's unit, at sentence ends; whole
        ones where there is none.

        Raises:
            ConfigError, DataError: as `encode` and `cut_into_chunks`.
        """
        self._check_texts(contexts, questions)
        return chunks_of(self.encoder, contexts, questions, length=length)

    def _check_texts(self, contexts: Sequence[str], questions: Sequence[str] | None) -> None:
        if isinstance(contexts, str) or isinstance(questions, str) or not contexts:
            raise ConfigError("no list of texts to encode; give a list, such as [text]")
        if (questions is not None) != (self.mode == "pure"):
            raise ConfigError(
                f"this model was trained in {self.mode!r} mode: its encoder "
                + (
                    "needs the question with the context"
                    if questions is None
                    else "reads no question"
                )
            )
        if questions is not None and len(questions) != len(contexts):
            raise ConfigError(
                f"{len(questions)} questions for {len(contexts)} contexts; give one for each"
            )

    def quantize(self, latent_BMd: Tensor, bits: int | None = None) -> Tensor:
        """What the receiver gets at this width (the bottleneck's own if not given); gradients pass
        straight through."""
        bits = self.bottleneck.config.bits if bits is None else bits
        return cast(Tensor, self.bottleneck(latent_BMd, bits))

    @property
    def fingerprint(self) -> int:
        """16 bits of a digest, which the payloads that it writes carry, so that a stranger's are
        refused.

        Cached: read it only once training is over.
        """
        return self.fingerprints[self.bottleneck.version]

    @cached_property
    def fingerprints(self) -> dict[int, int]:
        """By version of the wire format: 16 bits of the encoder's digest; in version 2 of all that
        a body is read with, since its frame says nothing else about that."""
        encoder, whole = self._digests()
        return {1: int(encoder[:4], 16), 2: int(whole[:4], 16)}

    @property
    def digest(self) -> str:
        """sha256 of all that payloads are read with, in hexadecimal: a payload store is recognised
        by it. Computed at each call."""
        return self._digests()[1]

    def _digests(self) -> tuple[str, str]:
        """Those of the encoder, and of the encoder and all else that payloads are read with."""
        encoder = parameter_digest(self.encoder.state_dict().items())
        facts = json.dumps([encoder, *self.bottleneck.format_facts()])
        tensors = parameter_digest(self.bottleneck.format_tensors().items())
        return encoder, hashlib.sha256(f"{facts} {tensors}".encode()).hexdigest()

    def fit_bottleneck(self, latents: Sequence[Tensor]) -> None:
        """Have the bottleneck learn what it can from latents `[B, M, d]` of training texts, now
        that the encoder stays as it is. Payloads that were made before are another model's then."""
        self.bottleneck.fit(latents)
        self.__dict__.pop("fingerprints", None)

    def payloads(
        self,
        latent_BMd: Tensor,
        *,
        bits: int | None = None,
        reader: str | None = None,
        slots: Sequence[int] | None = None,
    ) -> list[bytes]:
        """One payload per latent, made on the latents' device: only the bytes leave it.

        Args:
            reader: leave out the slots that are other readers' own; None for all readers.
            slots: how many vectors of each latent are sent, the first ones; None: all. Needed where
                the encoder's number of latents varies (`Encoder.latent_counts`).

        Raises:
            ConfigError: no adapter was trained for that reader; `slots` are needed.
        """
        bits = self.bottleneck.config.bits if bits is None else bits
        owner = None
        if reader is not None:
            self.check_name(reader)
            owner, latent_BMd = self.slots.owner(reader), self.slots.of(reader, latent_BMd)
        mark = self.slots.fingerprints(self.fingerprint)[owner]
        pack = partial(self.bottleneck.pack, bits=bits, fingerprint=mark)
        if slots is not None:
            return pack_ragged(pack, latent_BMd, slots)
        if self.encoder_config.varies:
            raise ConfigError(
                "this model's number of latents goes by the text's length: `payloads` needs it as "
                "slots=model.encoder.latent_counts(contexts, questions)"
            )
        return pack(latent_BMd)

    @torch.no_grad()
    def encode_payloads(
        self,
        contexts: Sequence[str],
        questions: Sequence[str] | None = None,
        *,
        bits: int | None = None,
        reader: str | None = None,
        answer_lengths: Sequence[int] | None = None,
    ) -> list[bytes]:
        """Text to payload bytes.

        Args:
            reader: as in `payloads`.
            answer_lengths: how long each answer will be (`Encoder.length_of`), for an encoder that
                gives hints; without them it says that this is not known.

        Raises:
            ConfigError: as `encode` and `payloads`; lengths for an encoder without hints, or not
                one for each context.
            DataError: a text is longer than the encoder reads.
        """
        self._check_texts(contexts, questions)
        for text, question in zip(contexts, questions or repeat(None), strict=False):
            self.encoder.check_length(text, question)
        slots = self.encoder.latent_counts(contexts, questions)
        latent_BMd = self.encode(contexts, questions)
        if answer_lengths is not None:
            if len(answer_lengths) != len(contexts):
                raise ConfigError(
                    f"{len(answer_lengths)} answer_lengths for {len(contexts)} contexts; give one "
                    "for each"
                )
            latent_BMd = self.encoder.with_hints(latent_BMd, [[n] for n in answer_lengths])
        return self.payloads(latent_BMd, bits=bits, reader=reader, slots=slots)

    @torch.no_grad()
    def encode_chunks(
        self,
        contexts: Sequence[str],
        questions: Sequence[str] | None = None,
        *,
        length: int | None = None,
        bits: int | None = None,
        reader: str | None = None,
    ) -> list[tuple[bytes, ...]]:
        """Texts of any length to several payloads each, which a `Receiver` takes in the place of
        one.

        Args:
            length: of a chunk at most, in the encoder's unit, with the context's label (and the
                question in pure mode); as much as the encoder reads unless given.
            reader: as in `payloads`.

        Raises:
            ConfigError, DataError: as `cut` and `payloads`.
        """
        length = self.encoder.limit.length if length is None else length
        chunks = self.cut(contexts, questions, length=length)
        latent_RMd = self.encode(chunks.contexts, chunks.questions)
        slots = chunks.pieces.slots
        return chunks.pieces.group(self.payloads(latent_RMd, bits=bits, reader=reader, slots=slots))

    def latents_of(self, payload: bytes) -> int:
        """How many latents a payload for all readers holds."""
        shape = self.encoder_config
        return self.bottleneck.read_header(payload).latents if shape.varies else shape.latents

    def decode_payloads(self, payloads: Sequence[bytes], *, reader: str | None = None) -> Tensor:
        """Latents `[B, M, d_z]` of payloads of one width that this model's encoder wrote, unpacked
        on the model's device. Where a payload has fewer than M, zeros stand for the others.

        Args:
            reader: allow payloads for this reader alone too, whose latents have fewer slots.

        Raises:
            ConfigError: no adapter was trained for that reader.
            PayloadError: damaged bytes, another shape, another model's fingerprint, or payloads for
                another reader.
        """
        return self.open_payloads(payloads, reader=reader)[0]

    def open_payloads(
        self, payloads: Sequence[bytes], *, reader: str | None = None
    ) -> tuple[Tensor, list[Header]]:
        """As `decode_payloads`, with the payloads' headers."""
        if reader is not None:
            self.check_name(reader)
        headers = []
        for i, payload in enumerate(payloads):
            with located(f"payload {i}"):
                headers.append(self.bottleneck.read_header(payload))
        shape, marks = self.encoder_config, self.fingerprints
        self.slots.check(headers, marks, d_z=shape.d_z, reader=reader, fewer=shape.varies)
        unpack = partial(self.bottleneck.unpack, device=next(self.parameters()).device)
        if not (shape.varies and payloads):
            return unpack(payloads)
        counts = [header.latents for header in headers]
        latent_BMd = unpack_ragged(
            lambda several: unpack(several)[0], payloads, counts, latents=shape.latents
        )
        return latent_BMd, headers
