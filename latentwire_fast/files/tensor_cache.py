"""Tensors kept on disk under names: of work that gives the same each time it is done.

`STEM.bin` holds fp16 values, and `STEM.jsonl` a line per tensor, written after its values are on
disk: a torn tail is found by its length and left out, damaged values by their checksum. What cannot
be trusted is as if it were not there. One process writes to a stem.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_seconds = 0.0  # see `seconds_computing`

Entry = tuple[int, tuple[int, ...], int]  # offset in bytes, shape, CRC-32 of the values


class TensorCache:
    """Tensors by name, in two files that are made when there is something to keep.

    Args:
        stem: the files' path without their endings.

    Attributes:
        hits, misses: how often a tensor was found, and was not.
    """

    def __init__(self, stem: Path) -> None:
        self._data = stem.with_name(f"{stem.name}.bin")
        self._lines = stem.with_name(f"{stem.name}.jsonl")
        self._index = _read_index(self._data, self._lines)
        self._map: np.ndarray | None = None
        self._checked: set[str] = set()
        self.hits = self.misses = 0

    def find(self, key: str) -> Tensor | None:
        """The tensor of a name, fp16 on the CPU; None if it is not there or damaged."""
        found = self._read(key) if key in self._index else None
        self.hits += found is not None
        self.misses += found is None
        return found

    def keep(self, key: str, tensor: Tensor) -> Tensor:
        """Keep a tensor, unless fp16 has no room for its values.

        Returns:
            What `find` gives from now on, so that the first time is as every other.
        """
        half = tensor.detach().half().cpu().contiguous()
        if bool((half.isinf() & tensor.detach().cpu().isfinite()).any()):
            return tensor.detach().cpu()
        self._data.parent.mkdir(parents=True, exist_ok=True)
        data = half.numpy().tobytes()
        with self._data.open("ab") as file:
            # Values begin at even offsets, also behind what a crash left.
            file.write(b"\0" * (file.tell() % 2))
            offset = file.tell()
            file.write(data)
        entry = (offset, tuple(half.shape), zlib.crc32(data))
        with self._lines.open("a") as file:
            # The line break comes first: what a crash left of a line stays a line of its own.
            file.write("\n" + json.dumps([key, *entry]))
        self._index[key] = entry
        return half

    def _read(self, key: str) -> Tensor | None:
        offset, shape, crc = self._index[key]
        end = offset + 2 * math.prod(shape)
        if self._map is None or end > len(self._map):
            self._map = np.memmap(self._data, dtype=np.uint8, mode="r")
        data = self._map[offset:end]
        if key not in self._checked:  # once: a checksum takes longer than the copy
            if zlib.crc32(data.tobytes()) != crc:
                del self._index[key]
                return None
            self._checked.add(key)
        return torch.from_numpy(np.array(data)).view(torch.float16).view(shape)


@torch.no_grad()
def find_all(
    cache: TensorCache, keys: Sequence[str], compute: Callable[[list[int]], Sequence[Tensor]]
) -> list[Tensor]:
    """The tensors of all keys, fp32 on the CPU (autocast knows no fp16 there).

    Args:
        compute: the tensors of the keys with these numbers, which the cache lacks.
    """
    global _seconds
    found = [cache.find(key) for key in keys]
    missing = [i for i, tensor in enumerate(found) if tensor is None]
    if missing:
        start = time.perf_counter()
        for i, tensor in zip(missing, compute(missing), strict=True):
            found[i] = cache.keep(keys[i], tensor)
        _seconds += time.perf_counter() - start
    return [tensor.float() for tensor in found if tensor is not None]


def seconds_computing() -> float:
    """How long this process has computed so far what its caches did not have."""
    return _seconds


def digest_of(values: object) -> str:
    """A name for JSON values: 32 hexadecimal digits of their sha256."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:32]


def _read_index(data: Path, lines: Path) -> dict[str, Entry]:
    if not (data.exists() and lines.exists()):
        return {}
    size, index = data.stat().st_size, {}
    for line in lines.read_text(errors="replace").splitlines():
        if (parsed := _parse(line)) is not None:
            key, entry = parsed
            if entry[0] + 2 * math.prod(entry[1]) <= size:
                index[key] = entry
    return index


def _parse(line: str) -> tuple[str, Entry] | None:
    """The entry of an index line; None if that is not what it holds."""
    try:
        key, offset, shape, crc = json.loads(line)
    except (ValueError, TypeError):
        return None
    if not (isinstance(key, str) and isinstance(shape, list) and _whole([offset, crc, *shape])):
        return None
    return (key, (offset, tuple(shape), crc)) if offset % 2 == 0 else None


def _whole(numbers: Sequence[object]) -> bool:
    return all(type(n) is int and n >= 0 for n in numbers)
