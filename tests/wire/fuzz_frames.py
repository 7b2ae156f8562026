"""Mutated payloads of version 2 whose CRC is repaired: each must be refused, or be what its symbols
are packed to.

    python tests/wire/fuzz_frames.py --seconds 60            # new mutations until the time is over
    python tests/wire/fuzz_frames.py --seconds 60 --seed 7   # the same ones again

Stops at the first failure with the payload in hex. `test_frames.py` runs a fixed number.
"""

from __future__ import annotations

import logging
import random
import struct
import time
import zlib
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from latentwire_fast.errors import PayloadError
from latentwire_fast.models.bottlenecks.autoregressive import AutoregressivePrior
from latentwire_fast.models.bottlenecks.symbols import SymbolBottleneck
from latentwire_fast.registry import BOTTLENECKS
from latentwire_fast.wire.frame import FRAME_BYTES, read_frame

logger = logging.getLogger(__name__)

M, D = 4, 8
LIMIT_SECONDS, TIMINGS = 0.010, 5  # as `fuzz_wire.py`: what is over the limit is timed again
KINDS: dict[str, dict[str, Any]] = {
    "uniform": {"version": 2, "group_size": 16, "prior": "static"},
    "fsq": {"levels": (8, 5, 4)},
    "vq": {"bits": 6},
    "residual_vq": {"bits": 10, "code_bits": 5, "stages": 3},
    "soft_codebook": {"version": 2, "codes": 16, "bits": 4},
}
KINDS |= {
    f"{kind} autoregressive": options
    | {"prior": "autoregressive", "prior_width": 8, "prior_steps": 1}
    for kind, options in KINDS.items()
}
# A phrase of every way to be refused: of all, of those that read version 1 too, of the others.
OF_ALL = (
    "fewer than the 7 before",
    "the flags of a payload",
    "a number is cut short",
    "this bottleneck sends",
    "M is",
    "repeats what its model says",
    "not what its symbols are coded to",
    "longer than any payload",
)
OF_UNIFORM = (
    "fewer than the 16",
    "first two bytes",
    "is not the one that its latent has",
)
OF_OTHERS = ("the first byte is",)


def refusals(kind: str) -> tuple[str, ...]:
    """A phrase of every way in which this bottleneck refuses bytes."""
    return (*OF_ALL, *(OF_UNIFORM if "version" in KINDS[kind] else OF_OTHERS))


@cache
def bottleneck(kind: str) -> SymbolBottleneck:
    """A bottleneck with a prior that knows a few latents."""
    torch.manual_seed(0)
    config = BOTTLENECKS.config(kind.split()[0], **KINDS[kind])
    part: SymbolBottleneck = BOTTLENECKS.part_of(config).build(config, latents=M, d_z=D)
    part.eval().fit([latents(60, M, seed=1)])
    if part.autoregressive is not None:
        disturb(part.autoregressive)
    return part


def disturb(prior: AutoregressivePrior) -> None:
    """Give every weight of a network something to do, which a training of one step does not."""
    generator = torch.Generator().manual_seed(5)
    state = prior.state_dict()
    for numbers in state.values():
        noise = torch.randint(-700, 701, numbers.shape, generator=generator)
        numbers.copy_((numbers.int() + noise).clamp(-30_000, 30_000))
    prior.load_state_dict(state)


def latents(count: int, rows: int, *, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp2(torch.randint(-3, 3, (count, 1, 1), generator=generator).float())
    return torch.randn(count, rows, D, generator=generator) * scale


def corpus(part: SymbolBottleneck) -> list[bytes]:
    """Payloads of every width and number of rows."""
    return [
        payload
        for bits in part.config.rates
        for rows in range(1, M + 1)
        for payload in part.pack(latents(3, rows, seed=rows), bits=bits, fingerprint=7)
    ]


def repaired(payload: bytes | bytearray) -> bytes:
    """The payload with the CRC that its other bytes ask for."""
    if len(payload) < FRAME_BYTES:
        return bytes(payload)
    crc = zlib.crc32(payload[7:], zlib.crc32(bytes(payload[:3]) + bytes(4)))
    return bytes(payload[:3]) + struct.pack("<I", crc) + bytes(payload[7:])


def mutated(rng: random.Random, payloads: list[bytes]) -> bytes:
    """A payload after one to four mutations, with its CRC repaired."""
    payload = bytearray(rng.choice(payloads))
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        mutation = rng.randrange(7)
        place = rng.randrange(len(payload)) if payload else 0
        if mutation == 0 and payload:
            payload[place] ^= 1 << rng.randrange(8)
        elif mutation == 1 and payload:
            payload[place] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif mutation == 2:
            del payload[rng.randrange(len(payload) + 1) :]
        elif mutation == 3:
            payload += rng.randbytes(rng.choice((1, 2, 16, 300)))
        elif mutation == 4 and payload:
            payload[0] = 0xA0 | rng.randrange(8)
        elif mutation == 5 and payload:  # a number of rows, of which M is the model's own
            payload[0], payload[7:7] = 0xA1, bytes([rng.randrange(M + 2)])
        else:  # another payload's body, or a number before it
            other = rng.choice(payloads)
            payload[7:] = other[rng.choice((7, 8)) :] if rng.random() < 0.5 else bytes(place)
    return repaired(payload)


def check(part: SymbolBottleneck, payload: bytes) -> str | None:
    """The reason why a payload is refused, None if it is accepted; AssertionError if wrongly."""
    for _ in range(TIMINGS):
        start, refusal = time.thread_time(), None
        try:
            latent_BMd, headers = part.unpack([payload], device=torch.device("cpu"))
        except PayloadError as error:
            refusal = str(error)
        seconds = time.thread_time() - start
        if seconds < LIMIT_SECONDS:
            break
    assert seconds < LIMIT_SECONDS, f"{1000 * seconds:.1f} ms for {payload.hex()}"
    if refusal is not None:
        return refusal
    header = headers[0]
    assert latent_BMd.shape == (1, header.latents, D)
    assert latent_BMd.isfinite().all()
    body, shape = read_frame(payload).body, (header.bits, header.latents)
    symbols_BN = torch.from_numpy(part.decode([body], *shape))
    assert part.encode(symbols_BN, *shape) == [body], payload.hex()
    if part.config.kind == "uniform":  # the latent has one payload too, not only its symbols
        again = part.pack(latent_BMd, bits=header.bits, fingerprint=header.fingerprint)
        assert again == [payload], payload.hex()
    return None


def fuzz(kind: str, seed: int, keep_going: Callable[[Counter[str]], bool]) -> Counter[str]:
    """Check mutated payloads while `keep_going` says so; counts by what became of them."""
    rng, part, counts = random.Random(f"{kind}:{seed}"), bottleneck(kind), Counter[str]()
    payloads = corpus(part)
    while keep_going(counts):
        payload = mutated(rng, payloads)
        try:
            refusal = check(part, payload)
        except AssertionError:
            raise
        except Exception as error:
            raise AssertionError(f"{type(error).__name__} for {payload.hex()}") from error
        known = (r for r in refusals(kind) if refusal is not None and r in refusal)
        counts["accepted" if refusal is None else next(known, refusal)] += 1
    return counts


def main(*, seconds: float = 60.0, seed: int | None = None) -> None:
    """Fuzz every bottleneck for a while; a seed makes the mutations the same again."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    seed = random.randrange(2**32) if seed is None else seed
    logger.info("seed %d", seed)
    for kind in KINDS:
        end = time.monotonic() + seconds / len(KINDS)
        counts = fuzz(kind, seed, lambda _, end=end: time.monotonic() < end)  # type: ignore[misc]
        logger.info("%s: %d payloads: %s", kind, counts.total(), dict(counts.most_common()))


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
