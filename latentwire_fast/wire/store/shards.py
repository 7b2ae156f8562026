"""One file of a store: a Parquet table with a row for each passage.

The same rows give the same bytes: there is no time and no name of a machine in them.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from latentwire_fast.errors import DataError
from latentwire_fast.wire.files import joined, read_payload_stream
from latentwire_fast.wire.sizes import utf8_bytes

# What stands for one passage: a payload, or those of all its chunks.
Message = bytes | tuple[bytes, ...]

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("payload", pa.binary(), nullable=False),  # as in a payload file
        pa.field("source_hash", pa.binary(32), nullable=False),  # sha256 of the text
        pa.field("text_bytes", pa.int64(), nullable=False),
        pa.field("model", pa.string(), nullable=False),
    ]
)


def source_hash(text: str) -> bytes:
    """The sha256 of a text, by which its payload is found."""
    return hashlib.sha256(text.encode()).digest()


def shard_bytes(
    ids: Sequence[str], texts: Sequence[str], messages: Sequence[Message], *, model: str
) -> bytes:
    """The content of a shard's file.

    Args:
        messages: of each text. One that was not cut into chunks is `bytes`.
        model: digest of the model.
    """
    columns = [
        list(ids),
        [content_of(message) for message in messages],
        [source_hash(text) for text in texts],
        [utf8_bytes(text) for text in texts],
        [model] * len(ids),
    ]
    arrays = [pa.array(c, field.type) for c, field in zip(columns, SCHEMA, strict=True)]
    file = io.BytesIO()
    pq.write_table(
        pa.Table.from_arrays(arrays, schema=SCHEMA),
        file,
        row_group_size=len(ids),
        use_dictionary=["model"],
        # Payloads and hashes are as good as random: compressed, they are larger.
        compression={name: "zstd" if name == "id" else "none" for name in SCHEMA.names},
        write_statistics=False,
    )
    return file.getvalue()


def read_shard(path: Path, columns: Sequence[str]) -> pa.Table:
    """Columns of a shard.

    Raises:
        DataError: no such file, or a damaged one.
    """
    try:
        return pq.read_table(path, columns=list(columns), partitioning=None)
    except (OSError, pa.ArrowException, KeyError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path} cannot be read ({reason}); copy the store again") from None


def content_of(message: Message) -> bytes:
    """What a row holds: the bytes that a file of these payloads has."""
    if isinstance(message, bytes):
        return message
    return message[0] if len(message) == 1 else joined(message)


def split_payloads(content: bytes, *, name: str) -> tuple[bytes, ...]:
    """The payloads of a row.

    Raises:
        PayloadError: a damaged one.
    """
    return tuple(read_payload_stream(io.BytesIO(content), name=name))
