"""What the bytes of a store depend on, and the files of its folder.

Every process makes the same plan from its own arguments and data, so processes need not talk to
each other: each writes the shards that are its own, as whole files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from latentwire_fast.errors import ConfigError, DataError
from latentwire_fast.files.atomic import file_entry, write_atomically
from latentwire_fast.files.json_files import read_json

FORMAT_VERSION = 1
PLAN, MANIFEST = "store.json", "manifest.json"


@dataclass(frozen=True, kw_only=True)
class StorePlan:
    """All that the bytes of a store depend on, beside the versions of torch and pyarrow and the
    kind of the processor.

    Attributes:
        model: the digest of the model (`LatentCodec.digest`).
        data: the digest of all ids and texts in their order (`data_digest`).
        passages: how many there are.
        shard_size: passages of a file; the last one may have fewer.
        batch_size: passages that are encoded together. Another number may round another way.
        threads: of each process on a CPU. Another number may round another way.
        dtype: that the encoder computes in.
        bits: per value; None: the model's own.
        reader: the one reader that the payloads are for; None: for all.
        chunk_length: of the chunks that texts are cut into; None: they are not cut.

    Raises:
        ConfigError: a size below 1.
    """

    model: str
    data: str
    passages: int
    shard_size: int = 1000
    batch_size: int = 32
    threads: int = 1
    dtype: str = "float32"
    bits: int | None = None
    reader: str | None = None
    chunk_length: int | None = None

    def __post_init__(self) -> None:
        for name in ("passages", "shard_size", "batch_size", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}, expected at least 1")

    @property
    def shards(self) -> int:
        """How many files of passages there are."""
        return -(-self.passages // self.shard_size)

    def rows(self, shard: int) -> range:
        """The numbers of the passages of a shard."""
        start = shard * self.shard_size
        return range(start, min(start + self.shard_size, self.passages))

    def name(self, shard: int) -> str:
        """The name of a shard's file."""
        return f"shard-{shard:05d}-of-{self.shards:05d}.parquet"

    def names(self) -> list[str]:
        """The names of all shards' files, in their order."""
        return [self.name(shard) for shard in range(self.shards)]


def data_digest(texts: Mapping[str, str]) -> str:
    """The sha256 of ids and texts in their order."""
    digest = hashlib.sha256()
    for identifier, text in texts.items():
        digest.update(json.dumps([identifier, text]).encode())
    return digest.hexdigest()


def start_store(folder: Path, plan: StorePlan) -> None:
    """Make the folder of a store, or find there one of the same plan, to go on with it. A plan
    without any shard yet gives way to another one.

    Raises:
        ConfigError: something else is there.
        OSError: the file system refuses.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; a store is a folder: give another path")
    # Another process may be about to write the plan: its temporary file has a dot in front.
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    names = [name for name in names if not name.startswith(".")]
    if PLAN not in names and names:
        raise ConfigError(f"{folder} holds other files and no store; give a new or empty folder")
    if PLAN in names:
        found = read_plan(folder)
        if found == plan:
            return
        if len(names) > 1:
            raise _other_store(folder, found, plan)
    folder.mkdir(parents=True, exist_ok=True)
    content = {"format_version": FORMAT_VERSION, **asdict(plan)}
    write_atomically(folder / PLAN, json.dumps(content, indent=2) + "\n")


def finish_store(folder: Path, plan: StorePlan) -> bool:
    """Write the manifest if all shards are there; whether they are.

    Several processes may do so at once: they write the same bytes.
    """
    if any(not (folder / name).exists() for name in plan.names()):
        return False
    if not (folder / MANIFEST).exists():
        for torn in folder.glob(".shard-*.tmp"):  # of processes that were killed
            torn.unlink(missing_ok=True)
        files = {name: file_entry(folder / name) for name in (PLAN, *plan.names())}
        write_atomically(folder / MANIFEST, json.dumps({"files": files}, indent=2) + "\n")
    return True


def read_plan(folder: Path) -> StorePlan:
    """The plan of a store, complete or not.

    Raises:
        DataError: no store, a damaged one, or one of another format version.
    """
    path = folder / PLAN
    content = read_json(path, error=DataError, advice="give the folder of a payload store")
    version = content.pop("format_version", None) if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(
            f"{path} is no payload store of format version {FORMAT_VERSION} (it says {version!r}); "
            "use the release of latentwire-fast that wrote it, or encode again"
        )
    try:
        return StorePlan(**content)
    except (TypeError, ConfigError) as error:
        raise DataError(f"{path} is damaged ({error}); copy the store again") from None


def _other_store(folder: Path, found: StorePlan, wanted: StorePlan) -> ConfigError:
    """What to say of a store that is there in the place of the one that is to be written."""
    old, new = asdict(found), asdict(wanted)
    changed = [name for name in old if old[name] != new[name]]
    if "model" in changed:
        what = "another model's payloads"
    elif "data" in changed:
        what = "the payloads of other data"
    else:
        settings = ", ".join(f"{name}={old[name]} and not {new[name]}" for name in changed)
        what = f"payloads made with {settings}"
    return ConfigError(
        f"{folder} holds {what}; give another folder, or the arguments that it was begun with"
    )
