"""The share of a data set that an encoder does not read: in a batch, longer texts are cut.

A single text that is to be sent is refused instead (`check_length` of the encoders).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass

from latentwire_fast.config.schema import Mode
from latentwire_fast.models.encoders.base import Encoder
from latentwire_fast.prompts.builder import encoded_text
from latentwire_fast.prompts.text_tokens import TextTokenizer


@dataclass(frozen=True)
class Truncation:
    """Counts of the texts that are cut, and the share of text that is lost.

    Attributes:
        examples: how many there are.
        cut: how many of them have a text that is longer than the encoder reads.
        share: of the text of all examples, how much is not read (0..1).
        limit: the setting that says how much is read, with its value.
    """

    examples: int
    cut: int
    share: float
    limit: str

    def __str__(self) -> str:
        return (
            f"{self.cut:,} of {self.examples:,} examples are longer than the encoder reads "
            f"({self.limit}): {self.share:.2%} of all text is cut off and not in the latents"
        )


def measure_truncation(
    encoder: Encoder, texts: Iterable[tuple[str, str]], *, mode: Mode
) -> Truncation:
    """Count what `encoder` cuts of (context, question) pairs, one pair per example."""
    known: dict[str, int] = {}  # several questions on one passage: it is tokenised once
    lengths = []
    for context, question in texts:
        text = encoded_text(context, question if mode == "pure" else None)
        if text not in known:
            known[text] = encoder.length_of(text)
        lengths.append(known[text])
    limit = encoder.limit
    over = [max(0, n - limit.length) for n in lengths]
    share = sum(over) / max(1, sum(lengths))
    return Truncation(len(over), sum(n > 0 for n in over), share, f"{limit.setting}={limit.length}")


def cut_context(tokens: list[int], ends: list[int], context: str, *, limit: int) -> list[int]:
    """Those of a pure-mode text's tokens that are read, at most `limit`: the context is cut and the
    question stays.

    Args:
        tokens: any values of the text's tokens, such as their ids.
        ends: index of the character behind each of them.
    """
    question = bisect_right(ends, len(encoded_text(context, None)))  # its first token
    kept = max(0, question - max(0, len(tokens) - limit))
    return [*tokens[:kept], *tokens[question:]][:limit]


def read_tokens(
    text: TextTokenizer, context: str, question: str | None, *, limit: int
) -> list[int]:
    """Token ids of a context, or of a context with its question, at most `limit`: the context of
    what is longer is cut."""
    whole = encoded_text(context, question)
    ids = text.ids(whole)
    if question is None or len(ids) <= limit:
        return ids[:limit]
    return cut_context(ids, text.ends(whole), context, limit=limit)
