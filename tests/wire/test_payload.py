"""The payload format: its specification, round trips, damage, refusals, limits."""

from __future__ import annotations

import json
import math
import re
import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest
import torch
from fuzz_wire import repaired
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from latentwire_fast import ops, wire
from latentwire_fast.config import schema
from latentwire_fast.errors import PayloadError

SPECIFICATION = Path(__file__).parents[2] / "docs" / "wire_format.md"
UNIT = 2.0**-24  # the smallest positive fp16


def by_the_book(payload: bytes) -> tuple[tuple[int, ...], list[float]]:
    """A decoder written from docs/wire_format.md alone, one value at a time: the oracle."""
    magic, version, bits, latents, d_z, size, reserved, fingerprint, crc = struct.unpack(
        "<2sBBHHBBHI", payload[:16]
    )
    assert (magic, version, reserved) == (b"LW", 1, 0)
    assert crc == zlib.crc32(payload[:12] + bytes(4) + payload[16:])
    fields = bits, latents, d_z, size, fingerprint
    n, at = latents * d_z, 16
    if bits == 16:
        return fields, list(struct.unpack(f"<{n}e", payload[16:]))
    codes: list[int] = []
    for start in range(0, n, size):
        r = min(size, n - start)
        low = payload[at : at + (r if bits == 8 else math.ceil(r / 2))]
        at += len(low)
        high = payload[at : at + math.ceil(r / 4)] if bits == 6 else b""
        at += len(high)
        for i in range(r):
            code = low[i] if bits == 8 else low[i // 2] >> 4 * (i % 2) & 15
            code |= (high[i // 4] >> 2 * (i % 4) & 3) << 4 if bits == 6 else 0
            codes.append(code - (1 << bits) if code >> (bits - 1) else code)
    scales = struct.unpack(f"<{math.ceil(n / size)}e", payload[at:])
    return fields, [code * scales[i // size] for i, code in enumerate(codes)]


def latent_of(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def accepted(payload: bytes) -> bool:
    try:
        wire.unpack(payload)
    except PayloadError:
        return False
    return True


def bitwise(latent: Tensor) -> bytes:
    return latent.numpy().tobytes()


# --- specification --------------------------------------------------------------------------------


def test_the_worked_example_of_the_specification_is_what_pack_writes() -> None:
    text, _, _ = SPECIFICATION.read_text().partition("## Version 2: a worked example")
    latent, decoded = (
        torch.tensor(json.loads(block)) for block in re.findall(r"```json\n(.*?)```", text, re.S)
    )
    (table,) = re.findall(r"```hex\n(.*?)```", text, re.S)
    rows = re.findall(r"^ *(\d+) +((?:[0-9a-f]{2} )+)", table, re.M)
    payload = b""
    for offset, digits in rows:
        assert len(payload) == int(offset)
        payload += bytes.fromhex(digits)
    assert wire.pack(latent, bits=6, group_size=16, fingerprint=0xBEEF) == payload
    result, header = wire.unpack(payload)
    assert torch.equal(result, decoded)
    assert by_the_book(payload) == ((6, 2, 3, 16, 0xBEEF), decoded.flatten().tolist())
    assert (header.bits, header.latents, header.d_z, header.group_size) == (6, 2, 3, 16)
    assert (header.fingerprint, header.version) == (0xBEEF, 1)


def test_the_sizes_in_the_specification_are_those_of_payloads() -> None:
    rows = re.findall(r"^\| (\d+) x (\d+) \|(.*)\|$", SPECIFICATION.read_text(), re.M)
    assert len(rows) == 2
    for latents, d_z, cells in rows:
        latent = torch.zeros(int(latents), int(d_z))
        stated = [int(cell.replace(",", "")) for cell in cells.split("|")]
        assert stated == [len(wire.pack(latent, bits=b, group_size=32)) for b in wire.BITS]


# --- round trips ----------------------------------------------------------------------------------

# M and d_z over their whole ranges, in latents that stay small enough for 2,000 cases; the largest
# are given as examples.
SHAPES = st.integers(1, 256).flatmap(lambda m: st.tuples(st.just(m), st.integers(1, 4096 // m)))


def spread_latent(shape: tuple[int, int], seed: int, exponents: tuple[int, int]) -> Tensor:
    """Values whose magnitudes range over powers of two, row by row, with zero rows and zeros."""
    generator = torch.Generator().manual_seed(seed)
    low, high = min(exponents), max(exponents)
    latent = torch.randn(shape, generator=generator).clamp(-4, 4)
    latent *= torch.exp2(torch.randint(low, high + 1, (shape[0], 1), generator=generator).float())
    latent[torch.rand(shape, generator=generator) < 0.05] = 0.0
    latent[torch.rand(shape[0], generator=generator) < 0.1] = -0.0
    return latent


@settings(max_examples=2000)
@given(
    shape=SHAPES,
    bits=st.sampled_from(wire.BITS),
    group_size=st.sampled_from(ops.GROUP_SIZES),
    seed=st.integers(0, 2**32 - 1),
    exponents=st.tuples(st.integers(-30, 13), st.integers(-30, 13)),
    fingerprint=st.integers(0, 0xFFFF),
)
@example((256, 4096), 16, 16, 0, (-30, 13), 1)
@example((256, 4096), 8, 16, 0, (-30, 13), 1)
@example((256, 4096), 6, 32, 0, (-30, 13), 1)
@example((256, 4096), 4, 64, 0, (-30, 13), 1)
@example((1, 4096), 6, 64, 0, (-26, -18), 0xFFFF)
@example((256, 1), 6, 64, 0, (-26, -18), 0xFFFF)
@example((1, 1), 4, 16, 0, (0, 0), 0)
def test_round_trip_is_byte_identical(
    shape: tuple[int, int],
    bits: int,
    group_size: int,
    seed: int,
    exponents: tuple[int, int],
    fingerprint: int,
) -> None:
    latent = spread_latent(shape, seed, exponents)
    payload = wire.pack(latent, bits=bits, group_size=group_size, fingerprint=fingerprint)
    decoded, header = wire.unpack(payload)
    stored = 0 if bits == 16 else group_size
    assert header == wire.Header(
        bits=bits, latents=shape[0], d_z=shape[1], group_size=stored, fingerprint=fingerprint
    )
    assert len(payload) == header.payload_bytes
    assert (decoded.dtype, tuple(decoded.shape)) == (torch.float32, shape)
    again = wire.pack(decoded, bits=bits, group_size=group_size, fingerprint=fingerprint)
    assert again == payload
    # Half a step of the group's scale, or of fp16 (its subnormals have the step UNIT).
    error, magnitude = (decoded - latent).abs(), latent.abs()
    if bits == 16:
        assert (error <= magnitude * 2.0**-11 + UNIT / 2).all()
    else:
        qmax = 2 ** (bits - 1) - 1
        amax = torch.nn.functional.pad(magnitude.flatten(), (0, -latent.numel() % group_size))
        amax = amax.view(-1, group_size).amax(1).repeat_interleave(group_size)[: latent.numel()]
        # A scale in fp16's subnormals is off by up to a UNIT after two roundings.
        bound = amax / qmax * (0.5 + qmax * 2.0**-11) + qmax * UNIT
        assert (error.flatten() <= bound).all()


@settings(max_examples=200)
@given(
    shape=st.tuples(st.integers(1, 6), st.integers(1, 40)),
    bits=st.sampled_from(wire.BITS),
    group_size=st.sampled_from(ops.GROUP_SIZES),
    seed=st.integers(0, 2**32 - 1),
    exponents=st.tuples(st.integers(-30, 13), st.integers(-30, 13)),
)
def test_unpack_agrees_with_the_specification(
    shape: tuple[int, int], bits: int, group_size: int, seed: int, exponents: tuple[int, int]
) -> None:
    latent = spread_latent(shape, seed, exponents)
    payload = wire.pack(latent, bits=bits, group_size=group_size, fingerprint=7)
    fields, values = by_the_book(payload)
    assert fields == (bits, *shape, 0 if bits == 16 else group_size, 7)
    assert wire.unpack(payload)[0].flatten().tolist() == values


@pytest.mark.parametrize("bits", ops.CODE_BITS)
def test_packing_reaches_a_fixed_point_for_every_scale(bits: int) -> None:
    """Groups whose scale is any fp16 number, approached at and between its roundings."""
    qmax = 2 ** (bits - 1) - 1
    multiples = torch.arange(0, 256, 1 / 64, dtype=torch.float64)  # of UNIT
    magnitudes = torch.cat(
        [
            multiples * qmax * UNIT,
            (multiples * qmax).round() * UNIT,
            torch.arange(0x7C00, dtype=torch.int16).view(torch.float16).double() * qmax,
        ]
    )
    latent_MD = torch.zeros(len(magnitudes), 16)  # a group per row
    latent_MD[:, 3] = magnitudes.float()
    payload = wire.pack(latent_MD, bits=bits, group_size=16)
    decoded, _ = wire.unpack(payload)
    assert wire.pack(decoded, bits=bits, group_size=16) == payload
    once = ops.fake_quantize(latent_MD, bits=bits, group_size=16)
    changed = (once != decoded).any(1)
    # What docs/wire_format.md says of the second quantisation.
    assert changed.any()
    assert magnitudes[changed].max() < (qmax + 0.5) * qmax * UNIT
    assert (once - decoded).abs().max() < qmax * UNIT


@pytest.mark.parametrize("bits", wire.BITS)
def test_a_value_beyond_what_the_bits_can_carry_is_refused(bits: int) -> None:
    """65504 times the largest code, which is exact in the payload; at 16 bits 65504."""
    limit = torch.tensor(65504.0 * (1 if bits == 16 else 2 ** (bits - 1) - 1))
    latent_BMD = torch.stack([latent_of((2, 20)), latent_of((2, 20))])
    latent_BMD[1, 0, 4] = -limit
    payload = wire.pack_batch(latent_BMD, bits=bits, group_size=32)[1]
    assert wire.unpack(payload)[0][0, 4] == -limit
    # fp16 rounds what is up to half a step above its largest value down to it.
    above = 65520.0 if bits == 16 else limit.nextafter(torch.tensor(math.inf)).item()
    latent_BMD[1, 0, 4] = above
    words = (
        r"65504, or take 8 bits" if bits == 16 else rf"at most {limit:.0f}, the largest at {bits}"
    )
    message = rf"the latent at \[1, 0, 4\] is {above}, which it cannot carry; rescale it .*{words}"
    with pytest.raises(PayloadError, match=message):
        wire.pack_batch(latent_BMD, bits=bits, group_size=32)
    with pytest.raises(PayloadError, match="cannot carry; rescale it"):
        wire.pack(latent_BMD[1], bits=bits, group_size=32)


@pytest.mark.parametrize("bits", ops.CODE_BITS)
def test_a_code_out_of_range_under_the_largest_scale_is_refused(bits: int) -> None:
    """Nothing that `pack` takes has such a value; it is refused for its code like elsewhere."""
    latent_MD = torch.zeros(1, 16)
    latent_MD[0, 0] = -65504.0 * (2 ** (bits - 1) - 1)
    payload = bytearray(wire.pack(latent_MD, bits=bits, group_size=16))
    payload[16] -= 1  # -qmax to -qmax - 1
    with pytest.raises(PayloadError, match="code byte 0 is out of range or has padding set"):
        wire.unpack(repaired(payload))


def test_the_widths_are_16_bits_and_those_of_codes() -> None:
    assert wire.BITS == schema.BITS == (16, *ops.CODE_BITS)


def test_equal_values_have_one_payload_whatever_their_storage() -> None:
    latent = latent_of((3, 20)).to(torch.bfloat16).float()
    latent[0, :5] = 0.0
    for bits in wire.BITS:
        payload = wire.pack(latent, bits=bits, group_size=16)
        negative_zeros = torch.where(latent == 0, -0.0, latent)
        transposed = latent.T.contiguous().T
        for same in (latent.bfloat16(), latent.double(), negative_zeros, transposed):
            assert wire.pack(same, bits=bits, group_size=16) == payload
        trained = latent.clone().requires_grad_()
        assert wire.pack(trained, bits=bits, group_size=16) == payload


@pytest.mark.gpu
@pytest.mark.parametrize("bits", wire.BITS)
def test_a_latent_on_the_gpu_gives_the_same_payload(bits: int) -> None:
    latent = latent_of((3, 21))
    expected = wire.pack(latent, bits=bits, group_size=16)
    assert wire.pack(latent.cuda(), bits=bits, group_size=16) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("bits", wire.BITS)
def test_a_payload_is_unpacked_on_the_gpu_alike(bits: int) -> None:
    payloads = wire.pack_batch(latent_of((4, 3, 21)), bits=bits, group_size=16)
    expected, headers = wire.unpack_batch(payloads)
    found, again = wire.unpack_batch(payloads, device="cuda")
    assert found.is_cuda
    assert torch.equal(found.cpu(), expected)
    assert again == headers


# --- damage ---------------------------------------------------------------------------------------

# (M, d_z, bits, group size, bytes)
SIZES = [(1, 8, 16, 16, 32), (2, 9, 6, 16, 34), (12, 16, 4, 32, 124), (9, 37, 6, 64, 279)]
LARGEST = (60, 64, 8, 32, 4096)


@pytest.mark.parametrize("case", [*SIZES, LARGEST], ids=lambda case: f"{case[-1]}_bytes")
def test_truncations_bit_flips_and_extensions_are_refused(
    case: tuple[int, int, int, int, int],
) -> None:
    latents, d_z, bits, group_size, size = case
    payload = wire.pack(latent_of((latents, d_z)), bits=bits, group_size=group_size)
    assert len(payload) == size
    assert accepted(payload)
    assert not any(accepted(payload[:length]) for length in range(size))
    assert not any(accepted(payload + bytes([byte])) for byte in range(256))
    assert not any(accepted(bytes([byte]) + payload) for byte in range(256))
    for at in range(size):
        for bit in range(8):
            assert not accepted(payload[:at] + bytes([payload[at] ^ 1 << bit]) + payload[at + 1 :])


def test_two_bit_flips_are_refused() -> None:
    payload = wire.pack(latent_of((4, 16)), bits=4, group_size=64)
    assert len(payload) == 50
    whole = int.from_bytes(payload, "little")
    pairs = list(combinations(range(400), 2))
    assert len(pairs) == 79_800
    for i, j in pairs:
        assert not accepted((whole ^ 1 << i ^ 1 << j).to_bytes(50, "little"))


# --- W4: refusals with a correct CRC --------------------------------------------------------------


def header_with(**changes: int) -> bytes:
    fields = {
        "version": 1,
        "bits": 8,
        "latents": 1,
        "d_z": 4,
        "group_size": 16,
        "reserved": 0,
        "fingerprint": 0,
    }
    return struct.pack("<2sBBHHBBHI", b"LW", *(fields | changes).values(), 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 5}, r"bits is 5; expected an integer of \(16, 8, 6, 4\)"),
        ({"bits": 16}, r"group size is 16; expected an integer of \(0,\)"),
        ({"group_size": 0}, r"group size is 0; expected an integer of \(16, 32, 64\)"),
        ({"group_size": 128}, "group size is 128"),
        ({"latents": 0}, r"M \(latents\) is 0; expected an integer from 1 to 65535"),
        ({"d_z": 0}, "d_z is 0"),
        ({"reserved": 1}, "reserved byte is 1"),
        ({"d_z": 5}, r"22 bytes, but a latent \[1, 5\] at 8 bits takes 23; it was cut short"),
    ],
)
def test_header_fields_out_of_range_are_refused(changes: dict[str, int], message: str) -> None:
    assert accepted(repaired(header_with() + bytes(6)))
    with pytest.raises(PayloadError, match=message):
        wire.unpack(repaired(header_with(**changes) + bytes(6)))


@pytest.mark.parametrize("more", [-1, 1, 2, 64])
def test_another_length_is_refused_whatever_the_crc(more: int) -> None:
    with pytest.raises(PayloadError, match=f"^{22 + more} bytes, but a latent .* takes 22; it was"):
        wire.unpack(repaired(header_with() + bytes(6 + more)))


def test_what_is_not_a_payload_is_refused() -> None:
    with pytest.raises(PayloadError, match="0 bytes are fewer than the 16"):
        wire.unpack(b"")
    with pytest.raises(PayloadError, match=r"first two bytes are 50 4b, a payload's are 4c 57"):
        wire.unpack(b"PK" + bytes(30))
    with pytest.raises(PayloadError, match="a payload is bytes, got str"):
        wire.unpack("LW" * 20)  # type: ignore[arg-type]
    with pytest.raises(
        PayloadError, match=r"the CRC-32 is 0x[0-9a-f]{8}, the header says 0x00000000"
    ):
        wire.unpack(header_with() + bytes(6))


@pytest.mark.parametrize(
    ("bits", "d_z", "body", "message"),
    [
        # two values each: codes, then the scale 1.0
        (4, 2, "79 003c", None),
        (4, 2, "78 003c", "scale of group 0"),  # -8
        (4, 2, "78 0100", "code byte 0"),  # -8 under the smallest scale
        (6, 2, "ff 0d 003c", None),
        (6, 2, "f0 0a 003c", "scale of group 0"),  # -32
        (8, 2, "7f81 003c", None),
        (8, 2, "7f80 003c", "scale of group 0"),  # -128
        (8, 2, "7f80 ff7b", "code byte 1"),  # -128 under the largest
        # padding bits
        (4, 1, "07 003c", None),
        (4, 1, "17 003c", "code byte 0"),
        (6, 1, "0f 01 003c", None),
        (6, 1, "1f 01 003c", "code byte 0"),
        (6, 1, "0f 05 003c", "code byte 1"),
        # scales
        (8, 2, "0000 0000", None),
        (8, 2, "0000 0080", "scale of group 0 is NaN, infinite or has its sign set"),  # -0.0
        (8, 2, "7f00 00bc", "scale of group 0 is NaN"),  # -1
        (8, 2, "7f00 007c", "scale of group 0 is NaN"),  # infinity
        (8, 2, "7f00 007e", "scale of group 0 is NaN"),
        (8, 2, "7f00 0000", "code byte 0"),  # a code under the scale 0
        (8, 2, "0000 003c", "scale of group 0 is not the one"),  # a scale without codes
        (8, 2, "7e00 003c", "scale of group 0 is not the one"),  # larger than the codes need
        (8, 2, "3f00 0040", "scale of group 0 is not the one"),  # 2 * 63 instead of 1 * 126
        (8, 2, "4000 0100", None),  # 64 of the smallest scale rounds up to it
        (8, 2, "3f00 0100", "scale of group 0 is not the one"),  # 63 of it rounds down to 0
        (8, 2, "5f00 0200", "scale of group 0 is not the one"),  # 95 twice the smallest: asks for 1
        # 16 bits
        (16, 2, "0000 ff7b", None),
        (16, 2, "0000 0080", "value 1 is NaN, infinite or -0.0"),
        (16, 2, "0000 00fc", "value 1 is NaN"),
        (16, 2, "017c 0000", "value 0 is NaN"),
    ],
)  # fmt: skip
def test_values_that_pack_never_writes_are_refused(
    bits: int, d_z: int, body: str, message: str | None
) -> None:
    size = 0 if bits == 16 else 16
    payload = repaired(header_with(bits=bits, d_z=d_z, group_size=size) + bytes.fromhex(body))
    if message is None:
        latent, _ = wire.unpack(payload)
        assert latent.flatten().tolist() == by_the_book(payload)[1]
        assert wire.pack(latent, bits=bits, group_size=16) == payload
    else:
        with pytest.raises(PayloadError, match=message) as refusal:
            wire.unpack(payload)
        assert "the CRC is right" in str(refusal.value)


# --- limits before allocation ---------------------------------------------------------------------


@pytest.mark.parametrize("bits", wire.BITS)
def test_a_huge_claim_costs_neither_time_nor_memory(
    bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 0 if bits == 16 else 64
    claim = header_with(bits=bits, latents=65535, d_z=65535, group_size=size)
    payload = repaired(claim + bytes(48))
    assert len(payload) == 64
    path = tmp_path / "claim.lwire"
    path.write_bytes(payload)
    # It makes tensors, which tracemalloc does not see.
    monkeypatch.setattr(wire.payload, "_decode", None)

    ways: list[Callable[[], object]] = [
        lambda: wire.unpack(payload),
        lambda: wire.unpack_batch([payload]),
        lambda: list(wire.read_payloads(path)),
    ]

    def refuse(way: Callable[[], object]) -> None:
        with pytest.raises(PayloadError, match=r"64 bytes, but a latent \[65535, 65535\]"):
            way()

    for way in ways:
        seconds = []
        for _ in range(20):
            start = time.perf_counter()
            refuse(way)
            seconds.append(time.perf_counter() - start)
        assert min(seconds) < 1e-3
        tracemalloc.start()
        refuse(way)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 2**20
