"""How often each value of a symbol comes: whole numbers that add up to 65536.

Shapes: `N` symbols, `S` values of all of them (the sum of their sizes), `R` messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from latentwire_fast.wire.range_coder import TOTAL, Row, Rows


@lru_cache(maxsize=256)
def flat_row(size: int) -> Row:
    """The row of a symbol whose values are all equally likely, up to what 65536 / size leaves."""
    return [value * TOTAL // size for value in range(size + 1)]


def whole_frequencies(weights_S: np.ndarray) -> np.ndarray:
    """Frequencies `[S]` int64 of one symbol: about as its weights are, each at least 1."""
    free = TOTAL - len(weights_S)
    row_S = 1 + np.floor(weights_S / weights_S.sum() * free).astype(np.int64)
    row_S[row_S.argmax()] += TOTAL - row_S.sum()
    return row_S


def flat_frequencies(sizes_N: np.ndarray) -> np.ndarray:
    """Frequencies `[S]` int32 of symbols of these sizes, before anything is known of them."""
    rows = [np.diff(flat_row(size)) for size in sizes_N.tolist()]
    return np.concatenate(rows).astype(np.int32)


def rows_of(frequencies_S: np.ndarray, sizes_N: np.ndarray) -> Rows:
    """The range coder's rows of the symbols.

    Raises:
        ValueError: a symbol's frequencies are not above 0, or do not add up to 65536.
    """
    ends_N = np.cumsum(sizes_N)
    sums_S = np.concatenate([[0], np.cumsum(frequencies_S, dtype=np.int64)])
    starts_N = ends_N - sizes_N
    of_symbols = sums_S[ends_N] - sums_S[starts_N]
    if (frequencies_S < 1).any() or (of_symbols != TOTAL).any():
        raise ValueError("the frequencies of a symbol do not add up to 65536")
    return Rows(
        (sums_S[start : end + 1] - sums_S[start]).tolist()
        for start, end in zip(starts_N.tolist(), ends_N.tolist(), strict=True)
    )


def flat_rows(sizes_N: np.ndarray) -> Rows:
    """`rows_of` `flat_frequencies`, with equal rows kept once."""
    return Rows(flat_row(size) for size in sizes_N.tolist())


def fitted_frequencies(
    symbols_RN: np.ndarray, sizes_N: np.ndarray, alike_N: Sequence[int], *, strength: float = 8.0
) -> np.ndarray:
    """Frequencies `[S]` int32 under which messages like these are short.

    A symbol's counts are joined by `strength` draws from what symbols of its kind have together,
    and by one from a flat row: few messages make no value of it impossible or very dear.

    Args:
        symbols_RN: the messages to learn from.
        alike_N: the kind of each symbol; those of one kind have one size and a related meaning.
    """
    kinds_N = np.asarray(alike_N)
    shared = {}
    for kind in np.unique(kinds_N):
        members = np.flatnonzero(kinds_N == kind)
        size = int(sizes_N[members[0]])
        counts = np.bincount(symbols_RN[:, members].reshape(-1), minlength=size) + 1.0 / size
        shared[kind] = counts / counts.sum()
    rows = []
    for n, size in enumerate(sizes_N.tolist()):
        own = np.bincount(symbols_RN[:, n], minlength=size)
        weight = own + strength * shared[kinds_N[n]] + 1.0 / size
        rows.append(whole_frequencies(weight))
    return np.concatenate(rows).astype(np.int32)
