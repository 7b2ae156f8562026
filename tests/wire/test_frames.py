"""Version 2 of the format: its specification, the range coder, frames, streams, damage, limits."""

from __future__ import annotations

import io
import json
import re
import tracemalloc
import zlib
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import fuzz_frames
import numpy as np
import pytest
import torch
from book import symbols_by_the_book
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from latentwire_fast import wire
from latentwire_fast.config.schema import BottleneckConfig
from latentwire_fast.config.serialization import from_json
from latentwire_fast.errors import PayloadError
from latentwire_fast.models.bottlenecks.symbols import SymbolBottleneck
from latentwire_fast.registry import BOTTLENECKS
from latentwire_fast.wire import frequencies, range_coder
from latentwire_fast.wire.files import joined
from latentwire_fast.wire.frame import Frame, read_frame, seal_frame

SPECIFICATION = Path(__file__).parents[2] / "docs" / "wire_format.md"
GOLDEN = Path(__file__).parent / "golden" / "v2"
CPU = torch.device("cpu")


@pytest.fixture(params=fuzz_frames.KINDS)
def part(request: pytest.FixtureRequest) -> SymbolBottleneck:
    return fuzz_frames.bottleneck(request.param)


@pytest.fixture
def payloads() -> list[bytes]:
    part = fuzz_frames.bottleneck("fsq")
    return part.pack(fuzz_frames.latents(5, 4, seed=3), bits=3, fingerprint=0x1234)


# --- specification --------------------------------------------------------------------------------


def test_the_worked_example_of_version_2_is_what_is_packed() -> None:
    text = SPECIFICATION.read_text()
    section = text[text.index("## Version 2: a worked example") :]
    latent, decoded = (
        torch.tensor(json.loads(block)) for block in re.findall(r"```json\n(.*?)```", section, re.S)
    )
    table = re.findall(r"```hex\n(.*?)```", section, re.S)[0]
    payload = b""
    for offset, digits in re.findall(r"^ *(\d+) +((?:[0-9a-f]{2} )+)", table, re.M):
        assert len(payload) == int(offset)
        payload += bytes.fromhex(digits)
    config = BOTTLENECKS.config("fsq", levels=(5,), prior="flat")
    part = BOTTLENECKS.part_of(config).build(config, latents=2, d_z=3)
    assert part.pack(latent[None], bits=3, fingerprint=0xBEEF) == [payload]
    assert torch.equal(part.unpack([payload], device=CPU)[0][0], decoded)
    rows = list(part.rows(3, 2))
    symbols = symbols_by_the_book(part, payload[7:], 3, 2)
    stated = re.findall(r"symbols are ([\d, and]+)\.", section)[0]
    assert symbols == [int(s) for s in re.findall(r"\d+", stated)]
    assert list(rows[0]) == [int(s) for s in re.findall(r"`\[([\d, ]+)\]`", section)[0].split(", ")]


@pytest.mark.parametrize("kind", fuzz_frames.KINDS)
def test_bodies_are_read_by_the_book(kind: str) -> None:
    part = fuzz_frames.bottleneck(kind)
    for bits in part.config.rates:
        for payload in part.pack(fuzz_frames.latents(3, 3, seed=5), bits=bits, fingerprint=1):
            body = read_frame(payload).body
            symbols = symbols_by_the_book(part, body, bits, 3)
            assert symbols == part.decode([body], bits, 3)[0].tolist()


def golden_folders() -> list[Path]:
    return sorted(GOLDEN.iterdir())


@pytest.mark.parametrize("folder", golden_folders(), ids=lambda folder: folder.name)
def test_golden_payloads_of_version_2_decode_for_ever(folder: Path) -> None:
    stored = json.loads((folder / "bottleneck.json").read_text())
    config: Any = from_json(BottleneckConfig, stored["config"], where="bottleneck")
    shape = {"latents": stored["latents"], "d_z": stored["d_z"]}
    part = BOTTLENECKS.part_of(config).build(config, **shape)
    part.load_state_dict(load_file(folder / "bottleneck.safetensors"))
    payloads = list(wire.read_payloads(folder / "payloads.lwire"))
    expected = json.loads((folder / "expected.json").read_text())
    assert len(payloads) == len(expected) > 2
    for payload, entry in zip(payloads, expected, strict=True):
        latent_BMd, (header,) = part.unpack([payload], device=CPU)
        body, shape = read_frame(payload).body, (header.bits, header.latents)
        assert symbols_by_the_book(part, body, *shape) == entry.pop("symbols")
        assert latent_BMd[0].tolist() == entry.pop("latent")
        assert {key: getattr(header, key) for key in entry} == entry
        assert header.version == 2
        again = part.pack(latent_BMd, bits=header.bits, fingerprint=header.fingerprint)
        if part.config.kind in ("uniform", "vq"):  # for others, a latent's latent is another
            assert again == [payload]
        symbols_BN = torch.from_numpy(part.decode([body], *shape))
        assert part.encode(symbols_BN, *shape) == [body]


def test_every_bottleneck_of_the_package_has_golden_payloads() -> None:
    names = [folder.name for folder in golden_folders()]
    own = [f"{name}_autoregressive" for name in BOTTLENECKS.names()]
    assert names == sorted([*BOTTLENECKS.names(), *own])


# --- the range coder ------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    sizes=st.lists(st.sampled_from([2, 3, 5, 8, 63, 255, 496, 4096]), min_size=1, max_size=60),
    seed=st.integers(0, 2**32 - 1),
    skew=st.sampled_from([0.05, 1.0, 30.0]),
)
def test_symbols_come_back_and_have_one_message(sizes: list[int], seed: int, skew: float) -> None:
    rng = np.random.default_rng(seed)
    weights = [rng.gamma(skew, size=size) + 1e-9 for size in sizes]
    counts = [1 + np.floor(w / w.sum() * (65536 - len(w))).astype(np.int64) for w in weights]
    for count in counts:
        count[count.argmax()] += 65536 - count.sum()
    rows = frequencies.rows_of(np.concatenate(counts).astype(np.int32), np.array(sizes))
    chosen = [[int(rng.choice(len(c), p=c / 65536)) for c in counts] for _ in range(2)]
    chosen += [[0] * len(sizes), [size - 1 for size in sizes], [int(c.argmin()) for c in counts]]
    messages = [range_coder.encode(symbols, rows) for symbols in chosen]
    assert range_coder.decode(messages, rows).tolist() == chosen
    many = range_coder.decode(messages * 3, rows)  # so many are decoded side by side
    assert many.tolist() == chosen * 3
    for symbols, message in zip(chosen, messages, strict=True):
        bits = sum(16 - np.log2(c[s]) for c, s in zip(counts, symbols, strict=True))
        assert len(message) <= bits / 8 + 1
        assert len(message) <= range_coder.most_bytes(len(sizes))
        for other in (message + b"\0", message + b"\1", message[:-1]):
            if other != message:
                try:
                    found = range_coder.decode([other], rows)[0].tolist()
                except PayloadError:
                    continue
                assert found != symbols
                assert range_coder.encode(found, rows) == other


def test_a_body_that_is_not_canonical_is_refused_alone_and_among_others() -> None:
    rows = frequencies.flat_rows(np.full(20, 11))
    messages = [range_coder.encode([(i + n) % 11 for n in range(20)], rows) for i in range(30)]
    for wrong in (
        messages[3] + b"\0",
        messages[3] + b"\1",
        b"\xff" * len(messages[3]),
        b"\xff" * 60,
    ):
        with pytest.raises(PayloadError, match=r"^the body is not what its symbols"):
            range_coder.decode([wrong], rows)
        with pytest.raises(PayloadError, match=r"^payload 7: the body is not what its symbols"):
            range_coder.decode([*messages[:7], wrong, *messages[8:]], rows)


def test_frequencies_that_no_fit_gives_are_an_error() -> None:
    for wrong in ([65535, 0], [65536, 1], [-1, 65537]):
        with pytest.raises(ValueError, match="do not add up to 65536"):
            frequencies.rows_of(np.array(wrong, np.int32), np.array([2]))


def test_fitted_frequencies_follow_the_counts_and_leave_nothing_out() -> None:
    symbols = np.array([[0, 1]] * 90 + [[1, 1]] * 10)
    found = frequencies.fitted_frequencies(symbols, np.array([3, 3]), [0, 0])
    assert found.dtype == np.int32
    first, second = found[:3], found[3:]
    assert first.sum() == second.sum() == 65536
    assert (found >= 1).all()
    assert first[0] > 5 * first[1] > 5 * first[2]
    assert second[1] > 0.9 * 65536


# --- damage ---------------------------------------------------------------------------------------


def accepted(part: SymbolBottleneck, payload: bytes) -> bool:
    try:
        part.unpack([payload], device=CPU)
    except PayloadError:
        return False
    return True


def test_W1_truncations_bit_flips_and_extensions_are_refused(part: SymbolBottleneck) -> None:
    for payload in fuzz_frames.corpus(part)[::5]:
        assert accepted(part, payload)
        damaged = [payload[:size] for size in range(len(payload))]
        damaged += [payload + bytes([byte]) for byte in range(256)]
        for bit in range(8 * len(payload)):
            flipped = bytearray(payload)
            flipped[bit // 8] ^= 1 << bit % 8
            damaged.append(bytes(flipped))
        assert not any(accepted(part, other) for other in damaged)


def test_W2_two_bit_flips_are_refused() -> None:
    part = fuzz_frames.bottleneck("uniform")
    (payload,) = part.pack(fuzz_frames.latents(1, 4, seed=2), bits=8, fingerprint=1)
    assert 30 <= len(payload) <= 50
    number, size = int.from_bytes(payload, "big"), len(payload)
    for first, second in combinations(range(8 * size), 2):
        damaged = (number ^ (1 << first) ^ (1 << second)).to_bytes(size, "big")
        with pytest.raises(PayloadError):
            read_frame(damaged)


@pytest.mark.parametrize("kind", fuzz_frames.KINDS)
@pytest.mark.parametrize("count", [1500, pytest.param(40_000, marks=pytest.mark.slow)])
def test_W4_mutated_payloads_are_refused_or_canonical(kind: str, count: int) -> None:
    if "autoregressive" in kind:  # the same frames, with another coder
        count //= 3
    counts = fuzz_frames.fuzz(kind, 0, lambda counts: counts.total() < count)
    assert set(counts) == {"accepted", *fuzz_frames.refusals(kind)}
    assert counts["accepted"] > count / 50


@pytest.mark.parametrize("content", [b"", b"\xa0", b"\xa0" * 6, b"LW\x01" + bytes(30), b"\xa4" * 9])
def test_what_is_no_frame_is_refused(part: SymbolBottleneck, content: bytes) -> None:
    with pytest.raises(PayloadError, match=r"payload 0: .*(cut short|else|release|bits is 0)"):
        part.unpack([content], device=CPU)
    with pytest.raises(PayloadError, match="bytes, got bytearray"):
        read_frame(bytearray(content))  # type: ignore[arg-type]


def test_version_1_names_version_2(payloads: list[bytes]) -> None:
    with pytest.raises(PayloadError, match="begin a payload of version 2, and this"):
        wire.unpack(payloads[0])
    with pytest.raises(PayloadError, match=r"payload 0: .* begin a payload of version 2"):
        wire.unpack_batch(payloads)


# --- files and streams ----------------------------------------------------------------------------


def test_a_single_payload_is_its_file(tmp_path: Path, payloads: list[bytes]) -> None:
    path = tmp_path / "x.lwire"
    assert wire.write_payloads(path, payloads[:1]) == len(payloads[0])
    assert path.read_bytes() == payloads[0]
    assert list(wire.read_payloads(path)) == payloads[:1]


def test_single_payloads_that_were_joined_are_refused(payloads: list[bytes]) -> None:
    """Only a stream says where its payloads end."""
    stream = io.BytesIO(payloads[0] + payloads[1])
    with pytest.raises(PayloadError, match=r"payload 0 at byte 0: .*, or others follow, such as"):
        list(wire.read_payload_stream(stream, name="a pipe"))


def test_a_batch_of_both_versions_is_refused() -> None:
    config = BOTTLENECKS.config("uniform", version=2)
    part = BOTTLENECKS.part_of(config).build(config, latents=1, d_z=4)
    second = part.pack(torch.ones(1, 1, 4), bits=6, fingerprint=1)[0]
    first = wire.pack(torch.ones(1, 4), bits=6, group_size=32)
    for both in ([first, second], [second, first]):
        with pytest.raises(PayloadError, match=r"payload 1 is of another version .* two batches"):
            part.unpack(both, device=CPU)


def test_a_stream_shares_the_first_bytes(tmp_path: Path, payloads: list[bytes]) -> None:
    path = tmp_path / "x.lwire"
    size = wire.write_payloads(path, payloads)
    assert size == sum(map(len, payloads)) - 3 * len(payloads) + 6 + len(payloads) + 1
    assert path.read_bytes()[:6] == b"LW\x02\xa0\x34\x12"
    assert list(wire.read_payloads(path)) == payloads


def test_both_versions_stand_in_one_file(tmp_path: Path, payloads: list[bytes]) -> None:
    path = tmp_path / "x.lwire"
    first = [wire.pack(torch.ones(1, n), bits=8, group_size=16) for n in (1, 40)]
    part = fuzz_frames.bottleneck("fsq")
    other = part.pack(fuzz_frames.latents(2, 2, seed=3), bits=3, fingerprint=0x1234)
    mixed = [first[0], *payloads, *other, first[1], *payloads, *payloads[:1], first[0]]
    wire.write_payloads(path, mixed)
    assert list(wire.read_payloads(path)) == mixed
    content = path.read_bytes()
    path.write_bytes(content + content + payloads[0])  # as `cat` joins files
    assert list(wire.read_payloads(path)) == [*mixed, *mixed, payloads[0]]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data, size: data[:-1], "payload 5 at byte .*: the stream ends without its end"),
        (lambda data, size: data[:-2], "payload 4 at byte .* should follow, .* do; the stream"),
        (lambda data, size: data[:size], "payload 2 at byte .*: the stream ends without"),
        (lambda data, size: data[:7] + b"\1" + data[8:], "payload 0 at byte 6: the CRC-32"),
        (lambda data, size: data[:6] + b"\3" + data[7:], "payload 0 at byte 6: the length 3 is"),
        (lambda data, size: data[:6] + b"\x94\0" + data[7:], "payload 0 .*: a number is cut"),
        (lambda data, size: data[:6] + b"\xff" * 9, "payload 0 at byte 6: a number is cut"),
        (lambda data, size: data + b"\n", "payload 5 at byte .*: 1 bytes are fewer"),
        (lambda data, size: data[:4], "payload 0 at byte .*: the stream ends without its end"),
        (lambda data, size: data[:3] + b"\xac" + data[4:], "payload 0 .*: the flags of a payload"),
    ],
)
def test_damage_in_a_stream_is_placed(
    payloads: list[bytes], damage: Callable[[bytes, int], bytes], message: str
) -> None:
    content, size = joined(payloads), 6 + sum(len(payload) - 2 for payload in payloads[:2])
    read: list[bytes] = []
    with pytest.raises(PayloadError, match=f"a pipe: {message}"):
        read.extend(wire.read_payload_stream(io.BytesIO(damage(content, size)), name="a pipe"))
    assert read == payloads[: len(read)]


def test_every_cut_of_a_stream_is_noticed(payloads: list[bytes]) -> None:
    content = joined(payloads)
    for size in range(len(content)):
        with pytest.raises(PayloadError):
            list(wire.read_payload_stream(io.BytesIO(content[:size]), name="a pipe"))


# --- limits ---------------------------------------------------------------------------------------


def test_W7_nothing_is_allocated_for_what_bytes_claim(part: SymbolBottleneck) -> None:
    huge = Frame(fingerprint=0, body=b"\1" * 50, latents=0xFFFF_FFFF)
    long = Frame(fingerprint=0, body=b"\1" * 3000)
    stream = b"LW\x02\xa0\0\0" + b"\xff\xff\xff\xff\x0f" + bytes(50)
    part.pack(fuzz_frames.latents(1, 4, seed=0), bits=part.config.bits, fingerprint=0)
    tracemalloc.start()
    with pytest.raises(PayloadError, match="M is 4294967295"):
        part.unpack([seal_frame(huge)], device=CPU)
    with pytest.raises(PayloadError, match="longer than any payload of this model"):
        part.unpack([seal_frame(long)], device=CPU)
    with pytest.raises(PayloadError, match="4294967295 bytes should follow, 50 do"):
        list(wire.read_payload_stream(io.BytesIO(stream), name="a pipe"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_the_crc_covers_all_but_itself(payloads: list[bytes]) -> None:
    payload = payloads[0]
    crc = zlib.crc32(payload[:3] + bytes(4) + payload[7:])
    assert payload[3:7] == crc.to_bytes(4, "little")
