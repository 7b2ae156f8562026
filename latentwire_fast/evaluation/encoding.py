"""The payloads of an evaluation's examples."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from latentwire_fast.data.examples import Example
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.serving.payload_batch import Message


@torch.no_grad()
def encode_examples(
    model: Interlingua,
    examples: Sequence[Example],
    *,
    bits: Sequence[int] = (),
    chunk_length: int | None = None,
) -> dict[int, list[Message]]:
    """One payload per example at each bit width, the model's own unless some are given.

    Args:
        chunk_length: of the chunks that contexts are cut into: each example then has the payloads
            of all of its chunks. None: one payload.
    """
    questions = [e.question for e in examples] if model.mode == "pure" else None
    chunks = model.cut([e.context for e in examples], questions, length=chunk_length)
    latent_RMd = model.encode(chunks.contexts, chunks.questions)
    made: dict[int, list[Message]] = {}
    for width in bits or [model.bottleneck_config.bits]:
        payloads = model.payloads(latent_RMd, bits=width, slots=chunks.pieces.slots)
        made[width] = [*payloads] if chunk_length is None else [*chunks.pieces.group(payloads)]
    return made
