"""Reading a store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path

import pyarrow as pa

from latentwire_fast.errors import DataError, PayloadError
from latentwire_fast.files.atomic import file_entry
from latentwire_fast.files.json_files import read_json
from latentwire_fast.wire.store.plan import MANIFEST, read_plan
from latentwire_fast.wire.store.shards import Message, read_shard, source_hash, split_payloads

KEPT_SHARDS = 8  # in memory: one of 1,000 payloads is a few hundred KB


class PayloadStore:
    """The payloads of a folder that `encode --data` wrote, by the ids of their passages.

    Ids are read when the first is asked for; payloads shard by shard, of which the last few stay in
    memory.

    Args:
        folder: of the store.

    Attributes:
        plan: what it was made from.

    Raises:
        DataError: no store, or one that is not complete or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.plan = read_plan(self.folder)
        self._check_complete()
        self._shard = lru_cache(maxsize=KEPT_SHARDS)(self._read)

    def __len__(self) -> int:
        return self.plan.passages

    def __iter__(self) -> Iterator[str]:
        """The ids in the order of the rows."""
        return iter(self._row_of)

    def __contains__(self, identifier: object) -> bool:
        return identifier in self._row_of

    def __getitem__(self, identifier: str) -> Message:
        """The payload of a passage; of texts that were cut into chunks, a tuple of payloads.

        Raises:
            DataError: there is no passage of that id.
            PayloadError: damaged payloads.
        """
        row = self._row_of.get(identifier)
        if row is None:
            known = ", ".join(repr(i) for i, _ in zip(self._row_of, range(3), strict=False))
            raise DataError(
                f"{self.folder} has no passage {identifier!r}; its {len(self):,} ids are such as "
                f"{known}"
            )
        return self._message(identifier, row)

    def items(self) -> Iterator[tuple[str, Message]]:
        """Ids and payloads in the order of the rows."""
        for identifier, row in self._row_of.items():
            yield identifier, self._message(identifier, row)

    def messages(self, identifiers: Sequence[str]) -> list[Message]:
        """The payloads of several passages, in the order of these ids.

        Raises:
            As `store[id]`.
        """
        return [self[identifier] for identifier in identifiers]

    def id_of(self, text: str) -> str | None:
        """The id of the passage with exactly this text; None if there is none."""
        return self._id_of_hash.get(source_hash(text))

    def text_bytes(self, identifier: str) -> int:
        """How many bytes the text of a passage has as UTF-8.

        Raises:
            DataError: there is no passage of that id.
        """
        self[identifier]
        shard, row = divmod(self._row_of[identifier], self.plan.shard_size)
        return int(self._shard(shard)["text_bytes"][row].as_py())

    def check_model(self, digest: str) -> None:
        """Raise unless the payloads are of this model.

        Args:
            digest: `LatentCodec.digest` of the model.

        Raises:
            PayloadError: they are another's.
        """
        if self.plan.model != digest:
            raise PayloadError(
                f"the payloads of {self.folder} are of the model {self.plan.model[:16]}, this one "
                f"is {digest[:16]}; give the run that wrote the store, or encode again"
            )

    def check_files(self) -> None:
        """Read all files and compare them with the manifest.

        Raises:
            DataError: one of them was changed.
        """
        for name, entry in self._entries.items():
            if file_entry(self.folder / name) != entry:
                raise DataError(f"{self.folder / name} was changed; copy the store again")

    @cached_property
    def _row_of(self) -> dict[str, int]:
        ids: list[str] = []
        for shard in range(self.plan.shards):
            ids += self._column(shard, "id")
        return {identifier: row for row, identifier in enumerate(ids)}

    @cached_property
    def _id_of_hash(self) -> dict[bytes, str]:
        hashes: list[bytes] = []
        for shard in range(self.plan.shards):
            hashes += self._column(shard, "source_hash")
        return dict(zip(hashes, self._row_of, strict=True))

    @cached_property
    def _entries(self) -> dict[str, dict[str, object]]:
        path = self.folder / MANIFEST
        content = read_json(path, error=DataError)
        files = content.get("files") if isinstance(content, dict) else None
        if not isinstance(files, dict) or not {*self.plan.names()} <= files.keys():
            raise DataError(f"{path} is damaged; copy the store again")
        return files

    def _check_complete(self) -> None:
        names = self.plan.names()
        if not (self.folder / MANIFEST).exists():
            there = sum((self.folder / name).exists() for name in names)
            raise DataError(
                f"{self.folder} is not complete: it has {there} of {len(names)} shards; run the "
                "command that began it again, which goes on where it was"
            )
        for name in self._entries:
            path = self.folder / name
            if not path.exists() or path.stat().st_size != self._entries[name]["bytes"]:
                raise DataError(f"{path} is missing or cut short; copy the store again")

    def _message(self, identifier: str, row: int) -> Message:
        shard, row = divmod(row, self.plan.shard_size)
        content: bytes = self._shard(shard)["payload"][row].as_py()
        if self.plan.chunk_length is None:
            return content
        return split_payloads(content, name=f"{self.folder}: passage {identifier!r}")

    def _column(self, shard: int, name: str) -> list:
        return self._read(shard, name)[name].to_pylist()

    def _read(self, shard: int, *columns: str) -> pa.Table:
        path = self.folder / self.plan.name(shard)
        table = read_shard(path, columns or ("payload", "text_bytes"))
        if table.num_rows != len(self.plan.rows(shard)):
            raise DataError(
                f"{path} has {table.num_rows} rows, expected {len(self.plan.rows(shard))}; copy "
                "the store again"
            )
        return table
