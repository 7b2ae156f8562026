"""Prompts for readers in tests, and the slow way to decode that fast ones are compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from latentwire_fast.data.examples import Example
from latentwire_fast.prompts.builder import Prompt, Turn
from latentwire_fast.readers.reader import Reader


def text_prompts(reader: Reader, examples: list[Example], *, answered: bool) -> list[Prompt]:
    return [
        reader.prompts.build(
            [Turn(e.question, e.answers[0] if answered else None)], context=e.context
        )
        for e in examples
    ]


def latent_prompts(reader: Reader, examples: list[Example], *, answered: bool) -> list[Prompt]:
    return [
        reader.prompts.build(
            [Turn(e.question, e.answers[0] if answered else None)],
            context=e.context,
            latent="context",
        )
        for e in examples
    ]


def random_prefixes(reader: Reader, count: int) -> list[Tensor]:
    """Prefixes of 1 to 7 positions at the scale of the reader's embeddings."""
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randn(1 + i % 7, reader.d_model, generator=generator) * reader.embedding_rms
        for i in range(count)
    ]


def inputs(
    reader: Reader, examples: list[Example], kind: str, *, answered: bool
) -> tuple[list[Prompt], list[Tensor] | None]:
    """Prompts and prefixes of one kind: `text` or `prefix`."""
    if kind == "text":
        return text_prompts(reader, examples, answered=answered), None
    prompts = latent_prompts(reader, examples, answered=answered)
    return prompts, random_prefixes(reader, len(examples))


def row_embeds(reader: Reader, prompt: Prompt, prefix: Tensor | None) -> Tensor:
    """One unpadded row of input embeddings, `[1, T, D]`."""
    embeds = reader.embedding(torch.tensor(prompt.ids))
    if prefix is not None:
        at = prompt.latent_at
        embeds = torch.cat([embeds[:at], prefix, embeds[at:]])
    return embeds[None]


@torch.no_grad()
def decode_slowly(
    reader: Reader,
    prompt: Prompt,
    prefix: Tensor | None,
    *,
    steps: int,
    stops: Sequence[int] | None = None,
    ban: int = 0,
) -> list[int]:
    """Greedy decoding without a cache, a batch or padding, from the model's own logits.

    Args:
        stops: what ends the answer, if not EOS alone; not in the first `ban` steps.
    """
    embeds = row_embeds(reader, prompt, prefix)
    stops = [reader.prompts.eos_id] if stops is None else stops
    ids: list[int] = []
    for step in range(steps):
        logits = reader.model(inputs_embeds=embeds, use_cache=False).logits[0, -1]
        if step < ban:
            logits[[*stops]] = -torch.inf
        token = int(logits.argmax())
        if token in stops:
            break
        ids.append(token)
        embeds = torch.cat([embeds, reader.embedding(torch.tensor([[token]]))], 1)
    return ids
