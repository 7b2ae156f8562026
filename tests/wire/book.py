"""A second decoder of version 2, written from docs/wire_format.md alone, one number at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate

from latentwire_fast.models.bottlenecks.symbols import SymbolBottleneck

Row = Sequence[int]


def by_the_book(body: bytes, count: int, row_after: Callable[[list[int]], Row]) -> list[int]:
    """The symbols of a body, which is one long fraction.

    Args:
        count: how many symbols there are.
        row_after: the row of the symbol behind these.
    """
    digits = len(body) + 2 * count + 8  # more than are looked at
    number, low, width, size = int.from_bytes(body.ljust(digits, b"\0"), "big"), 0, 2**56, 7
    symbols: list[int] = []
    for _ in range(count):
        row = row_after(symbols)
        unit, shift = width // 65536, 8 * (digits - size)
        inside = [low + unit * start <= number >> shift for start in row]
        symbol = inside.index(False) - 1 if False in inside else len(row)
        symbols.append(symbol)
        low, width = low + unit * row[symbol], unit * (row[symbol + 1] - row[symbol])
        while width < 2**48:
            low, width, size = low * 256, width * 256, size + 1
    return symbols


def symbols_by_the_book(part: SymbolBottleneck, body: bytes, bits: int, latents: int) -> list[int]:
    """The symbols of a payload's body."""
    rows = [list(row) for row in part.rows(bits, latents)]
    if not part.looks_back(bits):
        return by_the_book(body, len(rows), lambda symbols: rows[len(symbols)])
    after = AfterTheSymbolsBefore(part)
    known = latents * after.in_row
    return by_the_book(body, len(rows), lambda s: after.row(s) if len(s) < known else rows[len(s)])


def act(total: int) -> int:
    return min(max(total // 4096, 0), 32767)


def dot(weights: Row, numbers: Row) -> int:
    return sum(w * n for w, n in zip(weights, numbers, strict=True))


@cache
def power(part: int) -> int:
    """`2^24 * 2^(-part / 256)`, rounded down: the largest whole number whose 256th power is not
    above the 256th power of that."""
    low, high = 0, 2**24
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle**256 <= 2 ** (24 * 256 - part) else (low, middle - 1)
    return low


def weight(below: int) -> int:
    return power(below % 256) >> min(below // 256, 31)


class AfterTheSymbolsBefore:
    """The rows of the autoregressive prior."""

    def __init__(self, part: SymbolBottleneck) -> None:
        assert part.autoregressive is not None
        buffers = part.autoregressive.named_buffers()
        self.n = {name.split("_")[0]: buffer.tolist() for name, buffer in buffers}
        self.sizes = part.autoregressive.layout.sizes_C
        self.in_row = len(self.sizes)
        self.columns = min(16, self.in_row)
        self.pieces = -(-self.in_row // 16)

        self.done: dict[int, tuple[list[int], int]] = {0: ([0] * len(self.n["carry"]), 0)}

    def row(self, symbols: list[int]) -> list[int]:
        """Of the symbol behind these, which begin with those of the calls before."""
        n, at = self.n, max(place for place in self.done if place <= len(symbols))
        h, t = self.done[at]
        while True:
            p = t % self.pieces
            count = min(self.columns, self.in_row - p * self.columns)
            seen = symbols[at : at + count]
            x = [value for j, s in enumerate(seen) for value in n["values"][p][j][s]]
            if len(seen) < count:
                return self._row(h, x, t, p, len(seen))
            x += [0] * (len(n["inputs"][p][0]) - len(x))
            h = [
                act(4096 * n["shift"][t][i] + dot(n["carry"][i], h) + dot(n["inputs"][p][i], x))
                for i in range(len(h))
            ]
            t, at = t + 1, at + count
            self.done[at] = h, t

    def _row(self, h: list[int], x: list[int], t: int, p: int, j: int) -> list[int]:
        n, size = self.n, self.sizes[p * self.columns + j]
        g = [
            act(4096 * bias + dot(read, h) + dot(own[: len(x)], x))
            for bias, read, own in zip(
                n["bias"][t][j], n["read"][p][j], n["own"][p][j], strict=True
            )
        ]
        logits = [n["base"][t][j][k] + dot(n["out"][p][j][k], g) // 4096 for k in range(size)]
        weights = [weight(max(logits) - logit) for logit in logits]
        total = sum(weights)
        frequencies = [1 + w * (65536 - size) // total for w in weights]
        frequencies[logits.index(max(logits))] += 65536 - sum(frequencies)
        return [0, *accumulate(frequencies)]
