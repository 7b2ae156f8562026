"""The few sizes that batches are padded to, so that few graphs serve all of them."""

from __future__ import annotations

# Widths up to 256 are multiples of this: on average half of it is padding.
_WIDTH_STEP = 8
# Of wider ones, so many lie between one power of two and the next: at most 6% is padding.
_WIDTHS_PER_DOUBLING = 16


def row_bucket(rows: int) -> int:
    """The number of rows of the graph that reads a batch of so many: 1, 2, 3, 4, 6, 8, 12, 16, 24,
    32 and so on. A third of them at most is padding."""
    power = 1 << (rows - 1).bit_length()
    return power // 4 * 3 if rows <= power // 4 * 3 else power


def width_bucket(width: int) -> int:
    """The number of columns of the graph that reads prompts of up to so many positions."""
    below = 1 << max(0, (width - 1).bit_length() - 1)
    step = max(_WIDTH_STEP, below // _WIDTHS_PER_DOUBLING)
    return -(-width // step) * step
