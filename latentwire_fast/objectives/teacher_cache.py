"""The text-prompted teacher's hidden states, kept on disk: they never change, so they are computed
once.

One file per reader and process, `NAME-FINGERPRINT-RANK.bin`, of fp16 rows, and an index line per
prompt in a `.jsonl` of that name, written after its rows are on disk: a torn tail is found by its
length and dropped.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from latentwire_fast.prompts.builder import Prompt
from latentwire_fast.readers.reader import Reader


def prompt_key(prompt: Prompt) -> str:
    """A name for exactly these ids and targets."""
    text = json.dumps([prompt.ids, [i for i, t in enumerate(prompt.is_target) if t]])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class TeacherCache:
    """Hidden states `[N, D]` (fp16 on disk) at the scored positions of text prompts.

    Args:
        folder: made when there is something to keep; `rank` keeps the files of processes apart.
    """

    def __init__(self, folder: Path, *, rank: int = 0) -> None:
        self.folder = folder
        self.rank = rank
        self._index: dict[str, dict[str, tuple[int, int, int]]] = {}
        self.hits = self.misses = 0

    def _paths(self, reader: Reader) -> tuple[Path, Path]:
        stem = f"{reader.name}-{reader.fingerprint[:16]}-{self.rank}"
        return self.folder / f"{stem}.bin", self.folder / f"{stem}.jsonl"

    def _load_index(self, reader: Reader) -> dict[str, tuple[int, int, int]]:
        if reader.name in self._index:
            return self._index[reader.name]
        data, index_path = self._paths(reader)
        index: dict[str, tuple[int, int, int]] = {}
        size = data.stat().st_size if data.exists() else 0
        if index_path.exists():
            for line in index_path.read_text(errors="replace").splitlines():
                if (entry := _parse(line)) is None:
                    continue
                key, offset, rows, crc = entry
                if offset + rows * reader.d_model * 2 <= size:
                    index[key] = (offset, rows, crc)
        self._index[reader.name] = index
        return index

    def hidden(self, reader: Reader, prompts: Sequence[Prompt]) -> Tensor:
        """Hidden states `[N, D]` fp32 of the prompts' scored positions, in order."""
        index = self._load_index(reader)
        keys = [prompt_key(p) for p in prompts]
        found = {k: self._read(reader, *index[k]) for k in keys if k in index}
        fresh = [i for i, k in enumerate(keys) if found.get(k) is None]
        self.hits += len(keys) - len(fresh)
        self.misses += len(fresh)
        if fresh:
            with torch.no_grad(), reader.base():
                batch = reader.collate([prompts[i] for i in fresh])
                states = reader.target_hidden(batch).half().cpu()
            sizes = [sum(prompts[i].is_target) for i in fresh]
            for i, rows in zip(fresh, states.split(sizes), strict=True):
                found[keys[i]] = rows
                self._append(reader, keys[i], rows)
        parts = [found[k] for k in keys]
        return torch.cat([p for p in parts if p is not None]).float().to(reader.device)

    def _read(self, reader: Reader, offset: int, rows: int, crc: int) -> Tensor | None:
        with self._paths(reader)[0].open("rb") as file:
            file.seek(offset)
            data = file.read(rows * reader.d_model * 2)
        if zlib.crc32(data) != crc:
            return None  # damaged: computed again
        return torch.frombuffer(bytearray(data), dtype=torch.float16).view(rows, reader.d_model)

    def _append(self, reader: Reader, key: str, rows: Tensor) -> None:
        data_path, index_path = self._paths(reader)
        self.folder.mkdir(parents=True, exist_ok=True)
        data = rows.contiguous().numpy().tobytes()
        with data_path.open("ab") as file:
            offset = file.tell()
            file.write(data)
        entry = (offset, len(rows), zlib.crc32(data))
        with index_path.open("a") as file:
            # The line break comes first: what a crash left of a line stays a line of its own.
            file.write("\n" + json.dumps([key, *entry]))
        self._index[reader.name][key] = entry


def _parse(line: str) -> tuple[str, int, int, int] | None:
    """(key, offset in bytes, rows, CRC-32) of an index line; None if that is not what it holds."""
    try:
        key, *numbers = json.loads(line)
    except (ValueError, TypeError):
        return None
    whole = len(numbers) == 3 and all(isinstance(n, int) and n >= 0 for n in numbers)
    return (key, *numbers) if whole and isinstance(key, str) else None
