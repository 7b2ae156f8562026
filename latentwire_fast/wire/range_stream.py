"""The range coder where a symbol's row is known only when the symbols before it are decoded."""

from __future__ import annotations

from bisect import bisect_right

from latentwire_fast.wire.range_coder import (
    _LEAST_WIDTH,
    _WINDOW,
    TOTAL,
    TOTAL_BITS,
    Row,
    _check,
    unwritten,
)


class StreamDecoder:
    """Decodes what `range_coder.encode` wrote, one symbol at a time.

    The steps are those of `range_coder.decode`, which knows all rows before and is faster.
    """

    def __init__(self, message: bytes) -> None:
        self._message = message
        self._code = int.from_bytes(message[:_WINDOW].ljust(_WINDOW, b"\0"), "big")
        self._width, self._at = 1 << (8 * _WINDOW), _WINDOW

    def symbol(self, row: Row) -> int:
        """The next symbol, given its cumulative frequencies.

        Raises:
            PayloadError: bytes that `encode` never writes.
        """
        unit = self._width >> TOTAL_BITS
        value = self._code // unit
        if value >= TOTAL:
            raise unwritten(0, 1)
        symbol = bisect_right(row, value) - 1
        start = row[symbol]
        self._code -= unit * start
        self._width = unit * (row[symbol + 1] - start)
        while self._width < _LEAST_WIDTH:
            following = self._message[self._at] if self._at < len(self._message) else 0
            self._code, self._width = self._code << 8 | following, self._width << 8
            self._at += 1
        return symbol

    def finish(self) -> None:
        """Call it behind the last symbol.

        Raises:
            PayloadError: the message is not the one that `encode` writes for these symbols.
        """
        _check(self._message, self._code, self._width, self._at, 0, 1)
