"""Mutated payloads whose CRC is repaired: each must be refused, or be what its latent packs to.

    python tests/wire/fuzz_wire.py --seconds 60            # new mutations until the time is over
    python tests/wire/fuzz_wire.py --seconds 60 --seed 7   # the same ones again

Stops at the first failure with the payload in hex. `test_wire_fuzz.py` runs a fixed number.
"""

from __future__ import annotations

import logging
import random
import struct
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from latentwire_fast import wire
from latentwire_fast.errors import PayloadError

logger = logging.getLogger(__name__)

SHAPES = ((1, 1), (1, 13), (2, 3), (3, 21), (4, 16), (12, 16), (5, 77))
LIMIT_SECONDS = 0.010
# A slow payload is slow every time, a stall of the machine is not (on a busy one about a call in
# 50,000, whatever its bytes): what is over the limit is timed again.
TIMINGS = 5
PACKED_TOGETHER = 256
# Where fp16 has its edges: zeros, subnormals, one, the largest, infinities, NaNs.
FP16_EDGES = (0, 0x8000, 1, 2, 0x7F, 0x3FF, 0x400, 0x3C00, 0xBC00, 0x7BFF, 0x7C00, 0xFC00, 0x7E00)
# (offset, bytes) of the header's fields and what is put there
FIELDS = (
    (2, 1, (0, 1, 2, 255)),
    (3, 1, (0, 4, 5, 6, 7, 8, 16, 32, 255)),
    (4, 2, (0, 1, 2, 255, 256, 0x7FFF, 0xFFFF)),
    (6, 2, (0, 1, 2, 255, 256, 0x7FFF, 0xFFFF)),
    (8, 1, (0, 1, 16, 32, 48, 64, 128, 255)),
    (9, 1, (0, 1, 128)),
    (10, 2, (0, 1, 0xFFFF)),
)

# A phrase of every way to be refused; a payload with a repaired CRC never fails for its CRC.
REFUSALS = (
    "payload's header",
    "first two bytes",
    "format version",
    "bits is",
    "group size is",
    "M (latents) is",
    "d_z is",
    "reserved byte",
    "it was cut short or joined",
    "has its sign set",
    "not the one its codes ask for",
    "out of range or has padding set",
    "infinite or -0.0",
)


def repaired(payload: bytes | bytearray) -> bytes:
    """The payload with the CRC that its other bytes ask for."""
    if len(payload) < wire.HEADER_BYTES:
        return bytes(payload)
    crc = zlib.crc32(payload[16:], zlib.crc32(bytes(payload[:12]) + bytes(4)))
    return bytes(payload[:12]) + struct.pack("<I", crc) + bytes(payload[16:])


def corpus() -> list[bytes]:
    """Payloads of every width, group size and some shapes, with zero, tiny and huge groups."""
    generator = torch.Generator().manual_seed(0)
    payloads = []
    for shape in SHAPES:
        for bits in wire.BITS:
            for group_size in (16, 32, 64) if bits < 16 else (16,):
                latent = torch.randn(shape, generator=generator)
                exponent = torch.randint(-26, 17, (shape[0], 1), generator=generator)
                latent *= torch.where(exponent == -26, 0.0, torch.exp2(exponent.float()))
                latent = latent.clamp(-60000, 60000)
                payloads.append(wire.pack(latent, bits=bits, group_size=group_size))
    return payloads


Mutation = Callable[[random.Random, bytearray, list[bytes]], None]


def flip_bit(rng: random.Random, payload: bytearray, _: list[bytes]) -> None:
    payload[rng.randrange(len(payload))] ^= 1 << rng.randrange(8)


def set_byte(rng: random.Random, payload: bytearray, _: list[bytes]) -> None:
    payload[rng.randrange(len(payload))] = rng.choice(
        (0, 1, 0x7F, 0x80, 0x88, 0xFF, rng.randrange(256))
    )


def swap_bytes(rng: random.Random, payload: bytearray, _: list[bytes]) -> None:
    i, j = rng.randrange(len(payload)), rng.randrange(len(payload))
    payload[i], payload[j] = payload[j], payload[i]


def cut(rng: random.Random, payload: bytearray, _: list[bytes]) -> None:
    del payload[rng.randrange(len(payload)) :]


def extend(rng: random.Random, payload: bytearray, _: list[bytes]) -> None:
    payload += rng.randbytes(rng.choice((1, 2, 16, 64)))


def set_field(rng: random.Random, payload: bytearray, _: list[bytes]) -> None:
    offset, size, values = rng.choice(FIELDS)
    payload[offset : offset + size] = rng.choice(values).to_bytes(size, "little")


def set_scale(rng: random.Random, payload: bytearray, _: list[bytes]) -> None:
    """An edge of fp16 over one of the last words, which are scales (at 16 bits: values)."""
    back = 2 * rng.randrange(1, 5)
    if len(payload) >= wire.HEADER_BYTES + back:
        at = len(payload) - back
        payload[at : at + 2] = struct.pack("<H", rng.choice(FP16_EDGES))


def scale_up(rng: random.Random, payload: bytearray, _: list[bytes]) -> None:
    """The last scale times a power of two."""
    if len(payload) >= wire.HEADER_BYTES + 2:
        payload[-1] = (payload[-1] + 4 * rng.choice((-1, 1))) & 0xFF


def set_run(rng: random.Random, payload: bytearray, _: list[bytes]) -> None:
    """One value over a run of the body: equal codes, all padding set, zero groups."""
    start = rng.randrange(wire.HEADER_BYTES, len(payload) + 1)
    stop = min(len(payload), start + rng.choice((1, 2, 4, 8, 16, 48)))
    payload[start:stop] = bytes([rng.choice((0, 0x11, 0x77, 0x7F, 0x80, 0x88, 0xFF))]) * (
        stop - start
    )


def take_body(rng: random.Random, payload: bytearray, others: list[bytes]) -> None:
    """Another payload's body under this header, cut or filled up to the length that it asks for."""
    body = rng.choice(others)[wire.HEADER_BYTES :]
    size = len(payload) - wire.HEADER_BYTES
    payload[wire.HEADER_BYTES :] = (body * (size // len(body) + 1))[:size]


def reshape(rng: random.Random, payload: bytearray, _: list[bytes]) -> None:
    """Another layout with a body of the correct length: gets past the length check."""
    bits = rng.choice(wire.BITS)
    header = wire.Header(
        bits=bits,
        latents=rng.randrange(1, 9),
        d_z=rng.randrange(1, 40),
        group_size=0 if bits == 16 else rng.choice((16, 32, 64)),
    )
    body = payload[wire.HEADER_BYTES :] or bytearray(1)
    size = header.body_bytes
    head = struct.pack(
        "<2sBBHHBBHI", b"LW", 1, bits, header.latents, header.d_z, header.group_size, 0, 0, 0
    )
    payload[:] = head + (body * (size // len(body) + 1))[:size]


MUTATIONS: tuple[Mutation, ...] = (
    flip_bit,
    set_byte,
    swap_bytes,
    cut,
    extend,
    set_field,
    set_scale,
    scale_up,
    set_run,
    take_body,
    reshape,
)


def mutated(rng: random.Random, payloads: list[bytes]) -> bytes:
    """A payload after one to four mutations, with its CRC repaired."""
    payload = bytearray(rng.choice(payloads))
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        if len(payload) < wire.HEADER_BYTES:
            break
        rng.choice(MUTATIONS)(rng, payload, payloads)
    return repaired(payload)


def unpacked(payload: bytes) -> tuple[Tensor, wire.Header] | str:
    """The latent and the header, or why the payload is refused; AssertionError if it is slow."""
    found: tuple[Tensor, wire.Header] | str
    for _ in range(TIMINGS):
        start = time.thread_time()
        try:
            found = wire.unpack(payload)
        except PayloadError as error:
            found = str(error)
        seconds = time.thread_time() - start
        if seconds < LIMIT_SECONDS:
            break
    assert seconds < LIMIT_SECONDS, f"{1000 * seconds:.1f} ms for {payload.hex()}"
    return found


def assert_canonical(header: wire.Header, accepted: list[tuple[bytes, Tensor]]) -> None:
    """Raise unless these payloads are what the latents that they were unpacked to pack to."""
    for payload, latent in accepted:
        assert latent.shape == (header.latents, header.d_z), payload.hex()
        assert latent.dtype == torch.float32, payload.hex()
    packed = wire.pack_batch(
        torch.stack([latent for _, latent in accepted]),
        bits=header.bits,
        group_size=header.group_size,
        fingerprint=header.fingerprint,
    )
    for (payload, _), again in zip(accepted, packed, strict=True):
        assert again == payload, (
            f"{payload.hex()} is accepted, but its latent packs to {again.hex()}"
        )


def check(payload: bytes) -> str | None:
    """The reason why the payload is refused, None if it is accepted; AssertionError if wrongly."""
    found = unpacked(payload)
    if isinstance(found, str):
        return found
    latent, header = found
    assert_canonical(header, [(payload, latent)])
    return None


@dataclass
class Counts:
    """Counts of the payloads of a run, by what became of them."""

    tried: int = 0
    accepted: int = 0
    refused: Counter[str] = field(default_factory=Counter)

    def add(self, refusal: str | None) -> None:
        self.tried += 1
        if refusal is None:
            self.accepted += 1
        else:
            self.refused[next((r for r in REFUSALS if r in refusal), refusal)] += 1


def fuzz(seed: int, keep_going: Callable[[Counts], bool]) -> Counts:
    """Check mutated payloads while `keep_going` says so.

    Each is unpacked by itself; those that are accepted are packed again together, by header, which
    takes a third off the time.
    """
    rng, payloads, counts = random.Random(seed), corpus(), Counts()
    accepted: defaultdict[wire.Header, list[tuple[bytes, Tensor]]] = defaultdict(list)
    while keep_going(counts):
        payload = mutated(rng, payloads)
        try:
            found = unpacked(payload)
        except AssertionError:
            raise
        except Exception as error:
            raise AssertionError(f"{type(error).__name__} for {payload.hex()}") from error
        if isinstance(found, str):
            counts.add(found)
            continue
        counts.add(None)
        latent, header = found
        accepted[header].append((payload, latent))
        if len(accepted[header]) == PACKED_TOGETHER:
            assert_canonical(header, accepted.pop(header))
    for header, group in accepted.items():
        assert_canonical(header, group)
    return counts


def main(*, seconds: float = 60.0, seed: int | None = None) -> None:
    """Fuzz `wire.unpack` for a while; a seed makes the mutations the same again."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    seed = random.randrange(2**32) if seed is None else seed
    logger.info("seed %d", seed)
    end = time.monotonic() + seconds
    counts = fuzz(seed, lambda _: time.monotonic() < end)
    logger.info(
        "%d payloads: %d accepted and canonical, none wrongly; refused: %s",
        counts.tried,
        counts.accepted,
        dict(counts.refused.most_common()),
    )


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
