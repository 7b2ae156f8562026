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
_EIGHT = np.uint64(8)
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
    return encode_parts(
        (row[symbol], row[symbol + 1] - row[symbol])
        for symbol, row in zip(symbols, rows, strict=True)
    )


def encode_parts(parts: Iterable[tuple[int, int]]) -> bytes:
    """As `encode`, from where each symbol's part of its row begins, and its frequency."""
    low, width, size = 0, 1 << (8 * _WINDOW), _WINDOW
    for start, frequency in parts:
        unit = width >> TOTAL_BITS
        low += unit * start
        width = unit * frequency
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
            raise unwritten(index, count)
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
    decoder = Decoder(messages, len(rows))
    symbols_BN = np.empty((len(messages), len(rows)), np.int64)
    for n, row_S in enumerate(rows.arrays):
        symbols_BN[:, n] = decoder.take(row_S)
    decoder.finish()
    return symbols_BN


class Decoder:
    """Takes the symbols off some messages, one of each at a time: the next rows may go by the
    symbols before.

    Args:
        symbols: how many each message has.

    Raises:
        PayloadError: a message is longer than any of so many symbols.
    """

    def __init__(self, messages: Sequence[bytes], symbols: int) -> None:
        self._messages, count, most = messages, len(messages), most_bytes(symbols)
        for i, message in enumerate(messages):  # before memory is taken for them
            if len(message) > most:
                raise unwritten(i, count)
        longest = min(most + 2 * _WINDOW, max(map(len, messages)) + 2 * _WINDOW)
        padded = b"".join(message.ljust(longest, b"\0") for message in messages)
        self._bytes_Bb = np.frombuffer(padded, np.uint8).reshape(count, longest)
        self._code_B = np.zeros(count, np.uint64)
        for column in range(_WINDOW):
            self._code_B = self._code_B << _EIGHT | self._bytes_Bb[:, column]
        self._width_B = np.full(count, 1 << (8 * _WINDOW), np.uint64)
        self._at_B = np.full(count, _WINDOW)
        self._every_B = np.arange(count)

    def take(self, row_S: np.ndarray) -> np.ndarray:
        """The next symbols `[B]` int64.

        Args:
            row_S: uint64, of all messages; or `[B, S]`, one for each.

        Raises:
            PayloadError: bytes that `encode` never writes.
        """
        unit_B = self._width_B >> np.uint64(TOTAL_BITS)
        value_B = self._code_B // unit_B
        if (value_B >= TOTAL).any():
            raise unwritten(int((value_B >= TOTAL).argmax()), len(value_B))
        if row_S.ndim == 1:
            symbol_B = np.searchsorted(row_S, value_B, "right") - 1
            start_B, end_B = row_S[symbol_B], row_S[symbol_B + 1]
        else:
            symbol_B = (row_S <= value_B[:, None]).sum(1) - 1
            start_B = row_S[self._every_B, symbol_B]
            end_B = row_S[self._every_B, symbol_B + 1]
        code_B, width_B = self._code_B - unit_B * start_B, unit_B * (end_B - start_B)
        while (small_B := width_B < _LEAST_WIDTH).any():
            at_B = np.minimum(self._at_B, self._bytes_Bb.shape[1] - 1)
            next_B = self._bytes_Bb[self._every_B, at_B]
            code_B = np.where(small_B, code_B << _EIGHT | next_B, code_B)
            width_B = np.where(small_B, width_B << _EIGHT, width_B)
            self._at_B += small_B
        self._code_B, self._width_B = code_B, width_B
        return symbol_B

    def finish(self) -> None:
        """Raise unless the messages are what `encode` writes for the symbols that were taken.

        Raises:
            PayloadError: one is not.
        """
        for i, message in enumerate(self._messages):
            place = int(self._code_B[i]), int(self._width_B[i]), int(self._at_B[i])
            _check(message, *place, i, len(self._messages))


def _check(message: bytes, code: int, width: int, size: int, index: int, count: int) -> None:
    """Raise unless a message is the one that `encode` writes for what it was decoded to.

    The encoder's `low` is what the decoder has taken off the message, so nothing is encoded again.
    """
    if len(message) <= size:
        low = int.from_bytes(message.ljust(size, b"\0"), "big") - code
        if _shortest(low, width, size) == message:
            return
    raise unwritten(index, count)


def unwritten(index: int, count: int) -> PayloadError:
    """The error about one of some messages that `encode` does not write."""
    place = f"payload {index}: " if count > 1 else ""
    return PayloadError(
        f"{place}the body is not what its symbols are coded to; the CRC is right, so it was sent "
        "like this: check what wrote it, and whether it was this model"
    )
