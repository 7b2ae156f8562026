"""The latents and payloads of an evaluation's examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from latentwire_fast.data.examples import Example
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.models.joined import Pieces
from latentwire_fast.serving.payload_batch import Message


@dataclass(frozen=True)
class EncodedExamples:
    """Latents of some examples, before anything is lost of them.

    Attributes:
        latent_RMd: R latents.
        pieces: how many of them each example has.
        is_cut: whether contexts were cut into chunks.
    """

    latent_RMd: Tensor
    pieces: Pieces
    is_cut: bool

    def messages(
        self, model: Interlingua, *, bits: int | None = None, reader: str | None = None
    ) -> Sequence[Message]:
        """One payload per example, or where contexts were cut those of all its chunks.

        Args:
            bits, reader: as in `Interlingua.payloads`.
        """
        slots = self.pieces.slots
        payloads = model.payloads(self.latent_RMd, bits=bits, reader=reader, slots=slots)
        return self.pieces.group(payloads) if self.is_cut else payloads


@torch.no_grad()
def encode_examples(
    model: Interlingua, examples: Sequence[Example], *, chunk_length: int | None = None
) -> EncodedExamples:
    """The latents of examples.

    Args:
        chunk_length: of the chunks that contexts are cut into, each with a latent of its own; None:
            one latent.
    """
    questions = [e.question for e in examples] if model.mode == "pure" else None
    chunks = model.cut([e.context for e in examples], questions, length=chunk_length)
    latent_RMd = model.encode(chunks.contexts, chunks.questions)
    return EncodedExamples(latent_RMd, chunks.pieces, is_cut=chunk_length is not None)
