"""The autoregressive prior: what it learns, and that Python and C++ write the same bytes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from latentwire_fast.errors import PayloadError
from latentwire_fast.models.bottlenecks.autoregressive import AutoregressivePrior
from latentwire_fast.wire import frequencies, range_coder
from latentwire_fast.wire.native_prior import NativePrior, has_native, prior_of
from latentwire_fast.wire.recurrent_prior import POWERS, Layout, RecurrentPrior, rows_from

REST = frequencies.flat_rows(np.array([7, 300]))
needs_extension = pytest.mark.skipif(not has_native(), reason="the C++ extension is not built")


def layout(columns: int, features: int, rows: int = 3, width: int = 9) -> Layout:
    sizes = tuple(itertools.islice(itertools.cycle((2, 15, 5)), columns))
    return Layout(rows=rows, sizes_C=sizes, features=features, width=width)


def numbers(of: Layout, largest: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {
        name: rng.integers(-largest, largest, shape, np.int16, endpoint=True)
        for name, shape in of.shapes.items()
    }


def messages_of(of: Layout, rows: int, count: int = 6) -> np.ndarray:
    """Symbols `[B, N]` of so many rows, and two others."""
    rng = np.random.default_rng(4)
    sizes = [*np.tile(of.sizes_C, rows), 7, 300]
    return np.stack([rng.integers(0, size, count) for size in sizes], 1)


@pytest.mark.parametrize("largest", [600, 2**15 - 1])
@pytest.mark.parametrize(("columns", "features"), [(20, 1), (3, 2), (1, 8)])
def test_symbols_come_back_from_any_network(columns: int, features: int, largest: int) -> None:
    of = layout(columns, features)
    arrays = numbers(of, largest)
    networks = [RecurrentPrior(of, arrays)] + [NativePrior(of, arrays)] * has_native()
    for rows in (3, 1):
        symbols_BN = messages_of(of, rows)
        written = [network.encode(symbols_BN, REST) for network in networks]
        assert all(messages == written[0] for messages in written)
        for network in networks:
            found_BN = network.decode(written[0], rows * columns, REST)
            assert np.array_equal(found_BN, symbols_BN)
            again = network.decode(written[0][2:3], rows * columns, REST)
            assert np.array_equal(again, symbols_BN[2:3])


@pytest.mark.parametrize("kind", ["python", pytest.param("c++", marks=needs_extension)])
def test_bytes_that_are_never_written_are_refused(kind: str) -> None:
    of = layout(3, 1)
    network = (RecurrentPrior if kind == "python" else NativePrior)(of, numbers(of, 600))
    messages = network.encode(messages_of(of, 3), REST)
    for wrong in (messages[1] + b"\0", messages[1] + b"\1", b"\xff" * 12, b"\xff" * 23):
        with pytest.raises(PayloadError, match=r"^payload 1: the body is not what its symbols"):
            network.decode([messages[0], wrong], 9, REST)


@needs_extension
def test_the_extension_refuses_what_does_not_fit() -> None:
    of = layout(3, 1)
    arrays = numbers(of, 600)
    with pytest.raises(ValueError, match="own_PcWF is missing, or has another length"):
        NativePrior(of, arrays | {"own_PcWF": arrays["own_PcWF"][..., 1:]})
    network = prior_of(of, arrays)
    assert isinstance(network, NativePrior)
    for wrong in (-1, 2):
        with pytest.raises(ValueError, match="a symbol is not below its size"):
            network.encode(np.array([[wrong, 0, 0, 1, 1]]), REST)
    for count in (4, 30):
        with pytest.raises(ValueError, match="the number of symbols fits no message"):
            network.decode([b"\1"], count, REST)


def test_powers_and_frequencies_are_exact() -> None:
    for part, value in enumerate(POWERS.tolist()):
        assert value**256 <= 2 ** (24 * 256 - part) < (value + 1) ** 256
    logits_BK = np.random.default_rng(0).integers(-(2**28), 2**28, (50, 40))
    logits_BK[:25] //= 2**16
    sizes_B = np.arange(50) % 39 + 2
    rows_BS = rows_from(logits_BK, sizes_B)
    assert (rows_BS[:, 0] == 0).all()
    assert (rows_BS[:, -1] == range_coder.TOTAL).all()
    is_value_BK = np.arange(40) < sizes_B[:, None]
    assert ((np.diff(rows_BS) >= 1) == is_value_BK).all()


def learned(symbols_RN: torch.Tensor, rows: int, features: int) -> tuple[int, int]:
    """Bytes of the last 50 messages under the autoregressive and the static prior, each learned
    from the others."""
    sizes_N = np.full(symbols_RN.shape[1], 3)
    known, held = symbols_RN[:-50], symbols_RN[-50:]
    alone = frequencies.fitted_frequencies(known.numpy(), sizes_N, [0] * len(sizes_N))
    static = frequencies.rows_of(alone, sizes_N)
    of = Layout(rows=rows, sizes_C=(3,) * (len(sizes_N) // rows), features=features, width=24)
    prior, none = AutoregressivePrior(of), frequencies.flat_rows(np.array([], int))
    prior.fit(known, alone, steps=80)
    again = AutoregressivePrior(of)
    again.encode(held, none)  # with the numbers before the load
    again.load_state_dict(prior.state_dict())
    messages = again.encode(held, none)
    assert messages == prior.encode(held, none)
    apart = [range_coder.encode(symbols, static) for symbols in held.tolist()]
    return sum(map(len, messages)), sum(map(len, apart))


@pytest.mark.parametrize("features", [1, 8])
def test_it_learns_what_follows_from_the_symbols_before(features: int) -> None:
    """In a row from the one before, and within a row."""
    generator = torch.Generator().manual_seed(0)
    first_R3 = torch.randint(3, (650, 3), generator=generator)
    row_R4 = torch.cat([first_R3, 2 - first_R3[:, :1]], 1)
    own, static = learned(row_R4.repeat(1, 6), rows=6, features=features)
    assert own <= 0.65 * static


def test_it_is_no_worse_than_the_static_one_where_nothing_follows() -> None:
    generator = torch.Generator().manual_seed(0)
    symbols_RN = torch.randint(3, (150, 12), generator=generator)
    own, static = learned(symbols_RN, rows=3, features=1)
    assert own <= 1.02 * static
