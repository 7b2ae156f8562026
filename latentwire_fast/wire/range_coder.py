"""A range coder in whole numbers: symbols to as few bytes as their frequencies allow, and back.

`docs/wire_format.md` (version 2) is the specification. No float is used, so every machine reads the
same. A *row* is one symbol's cumulative frequencies `[0, f0, f0 + f1, ..., 65536]`: each symbol has
a frequency of 1 at least, and takes about `log2(65536 / frequency)` bits.

Shapes: `B` messages, `N` symbols of each.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

import numpy as np

from latentwire_fast.errors import PayloadError

TOTAL_BITS = 16  # the frequencies of a row add up to 2^16
TOTAL = 1 << TOTAL_BITS
_WINDOW = 7  # bytes that are looked at at once; the width is up to 2^56
_LEAST_WIDTH = 1 << (8 * (_WINDOW - 1))
_FEW = 12  # up to so many messages, one after the other is faster than side by side

Row = Sequence[int]


class Rows:
    """The rows of a message's symbols, in their order."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def at(self, places: Sequence[int]) -> Rows:
        """Some of them."""
        return Rows(self.rows[place] for place in places)

    @cached_property
    def arrays(self) -> list[np.ndarray]:
        """The rows as uint64."""
        return [np.asarray(row, np.uint64) for row in self.rows]


def most_bytes(symbols: int) -> int:
    """What no message of so many symbols is longer than."""
    return symbols * TOTAL_BITS // 8 + 1


def encode(symbols: Sequence[int], rows: Rows) -> bytes:
    """The message of one symbol per row; its last byte is not 0."""
    low, width, size = 0, 1 << (8 * _WINDOW), _WINDOW
    for symbol, row in zip(symbols, rows, strict=True):
        unit, start = width >> TOTAL_BITS, row[symbol]
        low += unit * start
        width = unit * (row[symbol + 1] - start)
        while width < _LEAST_WIDTH:
            low, width, size = low << 8, width << 8, size + 1
    return _shortest(low, width, size)


def _shortest(low: int, width: int, size: int) -> bytes:
    """Of the numbers of `size` bytes from `low` on, `width` of them, the one with the most zeros at
    its end, without these."""
    for zeros in range(_WINDOW, -1, -1):
        unit = 1 << (8 * zeros)
        number = -(-low // unit) * unit
        if number < low + width:
            break
    return number.to_bytes(size, "big").rstrip(b"\0")


def decode(messages: Sequence[bytes], rows: Rows) -> np.ndarray:
    """The symbols `[B, N]` int64 of messages that all have these rows.

    Raises:
        PayloadError: bytes that `encode` never writes (with the index, where there are several).
    """
    if len(messages) <= _FEW:
        found = np.empty((len(messages), len(rows)), np.int64)
        for i, message in enumerate(messages):
            found[i] = _decode(message, rows, i, len(messages))
        return found
    return _decode_side_by_side(messages, rows)


def _decode(message: bytes, rows: Rows, index: int, count: int) -> list[int]:
    padded = message + bytes(most_bytes(len(rows)) + _WINDOW)
    code, width, at = int.from_bytes(padded[:_WINDOW], "big"), 1 << (8 * _WINDOW), _WINDOW
    symbols = []
    for row in rows:
        unit = width >> TOTAL_BITS
        value = code // unit
        if value >= TOTAL:
            raise _unwritten(index, count)
        symbol = bisect_right(row, value) - 1
        start = row[symbol]
        code -= unit * start
        width = unit * (row[symbol + 1] - start)
        while width < _LEAST_WIDTH:
            code, width, at = code << 8 | padded[at], width << 8, at + 1
        symbols.append(symbol)
    _check(message, code, width, at, index, count)
    return symbols


def _decode_side_by_side(messages: Sequence[bytes], rows: Rows) -> np.ndarray:
    """As `_decode`, all messages a symbol at a time."""
    count, room = len(messages), most_bytes(len(rows)) + 2 * _WINDOW
    for i, message in enumerate(messages):  # before memory is taken for them
        if len(message) > most_bytes(len(rows)):
            raise _unwritten(i, count)
    longest = min(room, max(map(len, messages)) + 2 * _WINDOW)
    padded = b"".join(message.ljust(longest, b"\0") for message in messages)
    bytes_Bb = np.frombuffer(padded, np.uint8).reshape(count, longest)
    code_B = np.zeros(count, np.uint64)
    eight, total_bits = np.uint64(8), np.uint64(TOTAL_BITS)
    for column in range(_WINDOW):
        code_B = code_B << eight | bytes_Bb[:, column]
    width_B = np.full(count, 1 << (8 * _WINDOW), np.uint64)
    at_B = np.full(count, _WINDOW)
    every_B = np.arange(count)
    symbols_BN = np.empty((count, len(rows)), np.int64)
    for n, row_S in enumerate(rows.arrays):
        unit_B = width_B >> total_bits
        value_B = code_B // unit_B
        if (value_B >= TOTAL).any():
            raise _unwritten(int((value_B >= TOTAL).argmax()), count)
        symbol_B = np.searchsorted(row_S, value_B, "right") - 1
        start_B = row_S[symbol_B]
        code_B -= unit_B * start_B
        width_B = unit_B * (row_S[symbol_B + 1] - start_B)
        while (small_B := width_B < _LEAST_WIDTH).any():
            next_B = bytes_Bb[every_B, np.minimum(at_B, longest - 1)]
            code_B = np.where(small_B, code_B << eight | next_B, code_B)
            width_B = np.where(small_B, width_B << eight, width_B)
            at_B += small_B
        symbols_BN[:, n] = symbol_B
    for i, message in enumerate(messages):
        _check(message, int(code_B[i]), int(width_B[i]), int(at_B[i]), i, count)
    return symbols_BN


def _check(message: bytes, code: int, width: int, size: int, index: int, count: int) -> None:
    """Raise unless a message is the one that `encode` writes for what it was decoded to.

    The encoder's `low` is what the decoder has taken off the message, so nothing is encoded again.
    """
    if len(message) <= size:
        low = int.from_bytes(message.ljust(size, b"\0"), "big") - code
        if _shortest(low, width, size) == message:
            return
    raise _unwritten(index, count)


def _unwritten(index: int, count: int) -> PayloadError:
    place = f"payload {index}: " if count > 1 else ""
    return PayloadError(
        f"{place}the body is not what its symbols are coded to; the CRC is right, so it was sent "
        "like this: check what wrote it, and whether it was this model"
    )
