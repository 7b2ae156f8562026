"""What the losses through the head move and compute for each chunk of their rows, for the floors of
their designs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Chunk:
    """Sizes of one chunk, in bytes but for `product`.

    Attributes:
        hidden, hidden_fp32: its hidden states in the run's dtype, and in fp32.
        logits, logits_fp32: its logits.
        head: the head's weight, read once for each product with it.
        product: FLOPs of one product with the head.
    """

    hidden: int
    hidden_fp32: int
    logits: int
    logits_fp32: int
    head: int
    product: int


def chunks(shape: tuple[int, int, int], element: int, *, chunk_rows: int) -> Iterator[Chunk]:
    """The chunks of N rows, in order.

    Args:
        shape: N, D, V.
        element: bytes of a value of the run's dtype.
    """
    rows, width, vocabulary = shape
    for start in range(0, rows, chunk_rows):
        count = min(chunk_rows, rows - start)
        yield Chunk(
            hidden=count * width * element,
            hidden_fp32=count * width * 4,
            logits=count * vocabulary * element,
            logits_fp32=count * vocabulary * 4,
            head=vocabulary * width * element,
            product=2 * count * vocabulary * width,
        )
