"""What shorter checks than CRC-32 would let through: damaged payloads of a usual size, counted.

    python -m bench.wire_checks

A CRC is linear: whether damage is noticed goes by the bits that it changes, and not by the payload
(truncations apart, which take the check with them). So only changes are drawn, and the CRC of each
is computed; it is missed where that is 0. A shortened CRC-32 is its low bits.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tyro

# By name: the reflected polynomial, and how many low bits of the check are sent.
CHECKS = {
    "CRC-8 (0x07)": (0xE0, 8),
    "CRC-16 (CCITT)": (0x8408, 16),
    "CRC-32, 16 bits of it": (0xEDB88320, 16),
    "CRC-32, 24 bits of it": (0xEDB88320, 24),
    "CRC-32": (0xEDB88320, 32),
}


def table(polynomial: int) -> np.ndarray:
    """The CRCs of single bytes."""
    values = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        values = np.where(values & 1, values >> 1 ^ np.uint32(polynomial), values >> 1)
    return values.astype(np.uint32)


def remainders(content_Nb: np.ndarray, polynomial: int) -> np.ndarray:
    """CRCs `[N]` of rows of bytes, without inversions."""
    of_byte, crc_N = table(polynomial), np.zeros(len(content_Nb), np.uint32)
    for column in range(content_Nb.shape[1]):
        crc_N = of_byte[(crc_N ^ content_Nb[:, column]) & 0xFF] ^ crc_N >> np.uint32(8)
    return crc_N


def flips(rng: np.random.Generator, count: int, size: int, bits: int) -> np.ndarray:
    """Changes of some random bits, all different."""
    changed = np.zeros((count, size), np.uint8)
    for _ in range(bits):
        at = rng.integers(0, 8 * size, count)
        changed[np.arange(count), at // 8] ^= (1 << at % 8).astype(np.uint8)
    return changed


def bursts(rng: np.random.Generator, count: int, size: int, width: int) -> np.ndarray:
    """Random changes of so many bytes in a row."""
    changed = np.zeros((count, size), np.uint8)
    at = rng.integers(0, size - width + 1, count)
    for i in range(width):
        changed[np.arange(count), at + i] = rng.integers(0, 256, count)
    return changed


def swaps(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
    """Two bytes of a random payload in each other's place."""
    changed = np.zeros((count, size), np.uint8)
    rows, first = np.arange(count), rng.integers(0, size, count)
    second = (first + rng.integers(1, size, count)) % size
    changed[rows, first] = changed[rows, second] = rng.integers(1, 256, count)
    return changed


def missed(
    draw: Callable[[int], np.ndarray], polynomial: int, kept: int, check_bytes: int, count: int
) -> tuple[int, int]:
    """How many changes a check misses, of how many there were.

    Args:
        draw: so many changes of a payload and its check.
        kept: bits of the check that are sent.
        check_bytes: which stand at the end of a change.
    """
    found = total = 0
    for _ in range(0, count, 100_000):
        changed_Nb = draw(100_000)
        changed_Nb = changed_Nb[changed_Nb.any(1)]
        own, sent = changed_Nb[:, :-check_bytes], changed_Nb[:, -check_bytes:]
        stated_N = (sent.astype(np.uint32) << 8 * np.arange(check_bytes, dtype=np.uint32)).sum(1)
        actual_N = remainders(own, polynomial) & np.uint32((1 << kept) - 1)
        found += int((actual_N == stated_N).sum())
        total += len(changed_Nb)
    return found, total


def truncated(rng: np.random.Generator, size: int, name: str, count: int) -> tuple[int, int]:
    """The same for random payloads of which the last bytes were lost: those that the check is
    right for all the same. The check stands in front, as in the frame."""
    polynomial, kept = CHECKS[name]
    content_Nb = rng.integers(0, 256, (count // 10, size), np.uint8)
    mask, found, total = np.uint32((1 << kept) - 1), 0, 0
    whole_N = remainders(content_Nb, polynomial) & mask
    for lost in range(1, 11):
        cut_N = remainders(content_Nb[:, :-lost], polynomial) & mask
        found, total = found + int((cut_N == whole_N).sum()), total + len(content_Nb)
    return found, total


def main(*, size: int = 80, count: int = 1_000_000, seed: int = 0) -> None:
    """Print the table.

    Args:
        size: bytes of a payload without its check.
        count: damaged payloads of each kind.
    """
    rng = np.random.default_rng(seed)
    damages: dict[str, Callable[[int, int], np.ndarray]] = {
        "2 bits": lambda n, size: flips(rng, n, size, 2),
        "3 bits": lambda n, size: flips(rng, n, size, 3),
        "8 bits": lambda n, size: flips(rng, n, size, 8),
        "3 bytes in a row": lambda n, size: bursts(rng, n, size, 3),
        "8 bytes in a row": lambda n, size: bursts(rng, n, size, 8),
        "two bytes swapped": lambda n, size: swaps(rng, n, size),
    }
    print("| check | bytes | " + " | ".join(damages) + " | cut short | expected |")
    print("|---|---:|" + "---:|" * (len(damages) + 2))
    for name, (polynomial, kept) in CHECKS.items():
        cells = []
        for draw in damages.values():
            whole = size + kept // 8
            found, total = missed(
                lambda n, draw=draw, whole=whole: draw(n, whole),  # type: ignore[misc]
                *(polynomial, kept, kept // 8, count),
            )
            cells.append(f"{1e6 * found / total:,.0f}")
        found, total = truncated(rng, size, name, count)
        cells += [f"{1e6 * found / total:,.0f}", f"{1e6 / 2**kept:,.4g}"]
        print(f"| {name} | {kept // 8} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
