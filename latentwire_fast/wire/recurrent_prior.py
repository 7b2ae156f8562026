"""How likely each value of a symbol is after those before it: a small network in whole numbers.

`docs/wire_format.md` ("The autoregressive prior") is the specification. No float is used, so every
machine finds the same frequencies. Numbers that stand for fractions count in 1 / 256; weights count
in 1 / 4096. The network is learned by `models/bottlenecks/prior_network.py`.

A latent's rows are cut into pieces of at most 16 symbols. A state goes from piece to piece; within
a piece, a symbol sees the state and the symbols of the piece that stand before it.

Shapes: `B` messages, `N` symbols of each, `T` pieces of a message, `P` pieces of a row, `c` columns
of a piece, `K` values of a symbol at most, `e` features of a symbol, `F` = c * e, `H` the state's
width, `W` that of a symbol's own layer, `S` = K + 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isqrt

import numpy as np

from latentwire_fast.wire.range_coder import TOTAL, Decoder, Rows, encode_parts

PIECE = 16  # symbols at most
FRACTION_BITS, WEIGHT_BITS = 8, 12
_ONE = 1 << FRACTION_BITS
_MOST = (1 << 15) - 1  # an activation at most
_POWER_BITS, _FAR = 24, 31  # 2^24 >> 31 is 0
_TOGETHER = 64  # messages that are encoded at once


@dataclass(frozen=True)
class Layout:
    """Where the symbols of a latent stand.

    Attributes:
        rows: of a latent, M.
        sizes_C: how many values the symbols of a row have.
        features: numbers that stand for one symbol.
        width: of the state.
    """

    rows: int
    sizes_C: tuple[int, ...]
    features: int
    width: int

    @property
    def columns(self) -> int:
        """Of a piece; the last one of a row may have fewer."""
        return min(PIECE, len(self.sizes_C))

    @property
    def pieces(self) -> int:
        """Of a row."""
        return -(-len(self.sizes_C) // PIECE)

    @property
    def sizes_Pc(self) -> np.ndarray:
        """As `sizes_C`, by piece; 0 where a piece has no such column."""
        padded = np.zeros(self.pieces * self.columns, np.int64)
        padded[: len(self.sizes_C)] = self.sizes_C
        return padded.reshape(self.pieces, self.columns)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The network's numbers by name; all are int16."""
        P, c, K, e, H = self.pieces, self.columns, max(self.sizes_C), self.features, self.width
        T, W, F = self.rows * P, max(4, H // 2), c * e
        return {
            "base_TcK": (T, c, K),
            "values_PcKe": (P, c, K, e),
            "carry_HH": (H, H),
            "inputs_PHF": (P, H, F),
            "shift_TH": (T, H),
            "read_PcWH": (P, c, W, H),
            "own_PcWF": (P, c, W, F),
            "bias_TcW": (T, c, W),
            "out_PcKW": (P, c, K, W),
        }

    def visible_cF(self) -> np.ndarray:
        """Whether a column sees a feature: those of the columns before it."""
        before = np.arange(self.columns)[:, None] > np.arange(self.columns)
        return np.repeat(before, self.features, 1)


def _powers() -> np.ndarray:
    """`2^24 * 2^(-f / 256)` for f from 0 to 255, rounded down."""
    digits = 128
    root = 1 << (2 * digits - 1)  # 1 / 2, with 256 digits behind the point
    for _ in range(FRACTION_BITS):
        root = isqrt(root << (2 * digits))  # its square root, to as many digits
    found, power = [], 1 << (2 * digits)
    for _ in range(_ONE):
        found.append(power >> (2 * digits - _POWER_BITS))
        power = power * root >> (2 * digits)
    return np.array(found, np.int64)


POWERS = _powers()


def rows_from(logits_K: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Cumulative frequencies `[..., S]` from logits `[..., K]` to the base 2 in 1 / 256.

    Args:
        sizes: `[...]`, how many values there are; the logits behind them are not looked at.
    """
    is_value = np.arange(logits_K.shape[-1]) < sizes[..., None]
    logits_K = np.where(is_value, logits_K, np.iinfo(np.int32).min)
    below_K = logits_K.max(-1, keepdims=True) - logits_K
    weights_K = POWERS[below_K & (_ONE - 1)] >> np.minimum(below_K >> FRACTION_BITS, _FAR)
    room = TOTAL - sizes[..., None]
    found_K = is_value + weights_K * room // weights_K.sum(-1, keepdims=True)
    likeliest = logits_K.argmax(-1)[..., None]
    rest = TOTAL - found_K.sum(-1, keepdims=True)
    most = np.take_along_axis(found_K, likeliest, -1) + rest
    np.put_along_axis(found_K, likeliest, most, -1)
    rows_S = np.zeros((*found_K.shape[:-1], found_K.shape[-1] + 1), np.int64)
    np.cumsum(found_K, -1, out=rows_S[..., 1:])
    return rows_S


class RecurrentPrior:
    """The network of a model.

    Args:
        arrays: its numbers, as `Layout.shapes` names them.
    """

    def __init__(self, layout: Layout, arrays: Mapping[str, np.ndarray]) -> None:
        self.layout, self.sizes_Pc = layout, layout.sizes_Pc
        a = {name: arrays[name].astype(np.int64) for name in layout.shapes}
        self._base_TcK, self._values_PcKe = a["base_TcK"], a["values_PcKe"]
        self._carry_HH = np.ascontiguousarray(a["carry_HH"].T)
        self._inputs_PFH = np.ascontiguousarray(a["inputs_PHF"].swapaxes(1, 2))
        self._shift_TH = a["shift_TH"] << WEIGHT_BITS
        read_PcWH, own_PcWF = a["read_PcWH"], a["own_PcWF"] * layout.visible_cF()[:, None]
        P, c, W, _ = read_PcWH.shape
        self._inner = (c, W)
        self._read_PHx = np.ascontiguousarray(read_PcWH.reshape(P, c * W, -1).swapaxes(1, 2))
        self._own_PFx = np.ascontiguousarray(own_PcWF.reshape(P, c * W, -1).swapaxes(1, 2))
        self._bias_Tx = a["bias_TcW"].reshape(len(a["bias_TcW"]), -1) << WEIGHT_BITS
        self._out_PcWK = np.ascontiguousarray(a["out_PcKW"].swapaxes(2, 3))

    def encode(self, symbols_BN: np.ndarray, rest: Rows) -> list[bytes]:
        """The messages of symbols.

        Args:
            symbols_BN: those of the rows, then others.
            rest: the range coder's rows of the others.
        """
        messages = []
        known = symbols_BN.shape[1] - len(rest)
        for piece_BN in np.split(symbols_BN, range(_TOGETHER, len(symbols_BN), _TOGETHER)):
            starts_BN, frequencies_BN = self._parts(piece_BN[:, :known])
            for starts, frequencies, others in zip(
                starts_BN.tolist(), frequencies_BN.tolist(), piece_BN[:, known:], strict=True
            ):
                parts = list(zip(starts, frequencies, strict=True))
                parts += [
                    (row[symbol], row[symbol + 1] - row[symbol])
                    for symbol, row in zip(others.tolist(), rest, strict=True)
                ]
                messages.append(encode_parts(parts))
        return messages

    def decode(self, messages: Sequence[bytes], symbols: int, rest: Rows) -> np.ndarray:
        """The symbols `[B, N]` int64 of messages.

        Args:
            symbols: how many there are of the rows, before others.
            rest: the range coder's rows of the others.

        Raises:
            PayloadError: bytes that `encode` never writes.
        """
        decoder = Decoder(messages, symbols + len(rest))
        found_BN = np.empty((len(messages), symbols + len(rest)), np.int64)
        state_BH = np.zeros((len(messages), self.layout.width), np.int64)
        for t, p, places in self._steps(symbols):
            x_BF = np.zeros((len(messages), self._own_PFx.shape[1]), np.int64)
            sum_Bx = state_BH @ self._read_PHx[p] + self._bias_Tx[t]
            for column, n in enumerate(places):
                features = self._features(column)
                logits_BK = self._logits(sum_Bx, t, p, column)
                size = self.sizes_Pc[p, column]
                rows_BS = rows_from(logits_BK, np.full(len(messages), size))
                found_BN[:, n] = decoder.take(rows_BS.astype(np.uint64))
                x_BF[:, features] = self._values_PcKe[p, column, found_BN[:, n]]
                sum_Bx += x_BF[:, features] @ self._own_PFx[p, features]
            state_BH = self._next(state_BH, x_BF, t, p)
        for n, row_S in enumerate(rest.arrays, start=symbols):
            found_BN[:, n] = decoder.take(row_S)
        decoder.finish()
        return found_BN

    def _parts(self, symbols_BN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where each symbol's part of its row begins, and its frequency, `[B, N]` both."""
        starts_BN, ends_BN = np.empty_like(symbols_BN), np.empty_like(symbols_BN)
        state_BH = np.zeros((len(symbols_BN), self.layout.width), np.int64)
        for t, p, places in self._steps(symbols_BN.shape[1]):
            symbols_Bc = symbols_BN[:, places]
            x_BF = np.zeros((len(symbols_BN), self._own_PFx.shape[1]), np.int64)
            for column in range(len(places)):
                values_Ke = self._values_PcKe[p, column]
                x_BF[:, self._features(column)] = values_Ke[symbols_Bc[:, column]]
            sum_Bx = state_BH @ self._read_PHx[p] + self._bias_Tx[t] + x_BF @ self._own_PFx[p]
            for column, n in enumerate(places):
                logits_BK = self._logits(sum_Bx, t, p, column)
                rows_BS = rows_from(logits_BK, np.full(len(x_BF), self.sizes_Pc[p, column]))
                at_B1 = symbols_Bc[:, column, None]
                starts_BN[:, n] = np.take_along_axis(rows_BS, at_B1, 1)[:, 0]
                ends_BN[:, n] = np.take_along_axis(rows_BS, at_B1 + 1, 1)[:, 0]
            state_BH = self._next(state_BH, x_BF, t, p)
        return starts_BN, ends_BN - starts_BN

    def _steps(self, symbols: int) -> Iterator[tuple[int, int, range]]:
        """By piece: its number, its number within the row, and the places of its symbols."""
        columns, in_row = self.layout.columns, len(self.layout.sizes_C)
        for row in range(symbols // in_row):
            for p in range(self.layout.pieces):
                first, last = p * columns, min((p + 1) * columns, in_row)
                yield (
                    row * self.layout.pieces + p,
                    p,
                    range(row * in_row + first, row * in_row + last),
                )

    def _features(self, column: int) -> slice:
        return slice(column * self.layout.features, (column + 1) * self.layout.features)

    def _logits(self, sum_Bx: np.ndarray, t: int, p: int, column: int) -> np.ndarray:
        """Logits `[B, K]` of a column, from what its layer has summed."""
        _, width = self._inner
        own_BW = _activation(sum_Bx[:, column * width : (column + 1) * width])
        return self._base_TcK[t, column] + (own_BW @ self._out_PcWK[p, column] >> WEIGHT_BITS)

    def _next(self, state_BH: np.ndarray, x_BF: np.ndarray, t: int, p: int) -> np.ndarray:
        """The state behind a piece."""
        return _activation(
            state_BH @ self._carry_HH + x_BF @ self._inputs_PFH[p] + self._shift_TH[t]
        )


def _activation(sum_: np.ndarray) -> np.ndarray:
    return np.clip(sum_ >> WEIGHT_BITS, 0, _MOST)
