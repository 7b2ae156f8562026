"""A text that is longer than an encoder should read at once, cut at sentence ends.

Each chunk becomes a latent of its own. Nothing of a text is lost but the white space between two
chunks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from latentwire_fast.errors import ConfigError, DataError
from latentwire_fast.models.encoders.base import Encoder
from latentwire_fast.models.joined import Pieces
from latentwire_fast.prompts.builder import encoded_text
from latentwire_fast.prompts.sentences import sentence_ends

_WORD_END = re.compile(r"\S(?=\s)")


@dataclass(frozen=True)
class Chunks:
    """The texts of which an encoder makes the latents of some prompts.

    Attributes:
        contexts: all chunks of the first prompt's context, then those of the second, and so on.
        questions: in pure mode, the question of each of these.
        pieces: how many belong to each prompt, and how many vectors each latent has.
    """

    contexts: tuple[str, ...]
    questions: tuple[str, ...] | None
    pieces: Pieces


def chunks_of(
    encoder: Encoder,
    contexts: Sequence[str],
    questions: Sequence[str] | None = None,
    *,
    length: int | None,
) -> Chunks:
    """The chunks of several contexts; each context is one where there is no `length`.

    Raises:
        ConfigError, DataError: as `cut_into_chunks`.
    """
    asked = [None] * len(contexts) if questions is None else questions
    parts = [
        [context] if length is None else cut_into_chunks(encoder, context, question, length=length)
        for context, question in zip(contexts, asked, strict=True)
    ]
    repeated = None
    if questions is not None:
        repeated = tuple(q for q, own in zip(questions, parts, strict=True) for _ in own)
    chunks = tuple(chunk for own in parts for chunk in own)
    pieces = Pieces(tuple(map(len, parts)), encoder.latent_counts(chunks, repeated))
    return Chunks(chunks, repeated, pieces)


def cut_into_chunks(
    encoder: Encoder, context: str, question: str | None = None, *, length: int
) -> list[str]:
    """The context in chunks, each as long as it can be: exact to the token, in the encoder's own
    unit. A sentence that is too long is cut between words, and a word between characters.

    Args:
        question: of pure mode; the encoder reads it with every chunk.
        length: the most that the encoder reads of each, with the context's label and the question.

    Raises:
        ConfigError: `length` is more than the encoder reads, or less than 1.
        DataError: nothing of the context fits beside the question.
    """
    limit = encoder.limit
    if not 1 <= length <= limit.length:
        raise ConfigError(
            f"chunk_length={length:,} {limit.unit}, expected 1 to {limit.length:,}, which is what "
            "the encoder reads at once"
        )
    chunks, rest = [], context.strip()
    while rest:

        def fits(end: int, rest: str = rest) -> bool:
            text = encoded_text(rest[:end].rstrip(), question)
            return encoder.length_of(text) <= length

        end = len(rest) if fits(len(rest)) else _best_end(rest, fits)
        if not end:
            raise DataError(
                f"no part of the text fits into chunks of {length:,} {limit.unit}: the context's "
                "label"
                + (" takes" if question is None else " and the question take")
                + " as many; "
                "give a larger chunk_length"
            )
        chunks.append(rest[:end].rstrip())
        rest = rest[end:].lstrip()
    return chunks or [context]


def _best_end(text: str, fits: Callable[[int], bool]) -> int:
    """Where the longest chunk at a text's start ends; 0 where nothing fits."""
    words = [match.end() for match in _WORD_END.finditer(text)]
    for ends in (sentence_ends(text), words):
        if end := _last_fitting(ends, fits):
            return end
    return _last_fitting(range(1, len(text)), fits)


def _last_fitting(ends: Sequence[int], fits: Callable[[int], bool]) -> int:
    """The last of ascending ends that fits, without a look at much longer ones; 0 for none."""
    low, high, step = 0, 0, 1  # the first `low` fit
    while high < len(ends):
        high = min(len(ends), low + step)
        if not fits(ends[high - 1]):
            high -= 1
            break
        low, step = high, 2 * step
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(ends[middle - 1]) else (low, middle - 1)
    return ends[low - 1] if low else 0
