"""Rows of local files: JSON, JSON lines, CSV, TSV or Parquet, packed or not, alone, in a tar
archive or in a folder.

A row keeps the place that it was read from, for messages: `dev.jsonl: line 3`. Lines are counted
from 1, as editors do; rows of a list from 0.
"""

from __future__ import annotations

import csv
import io
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentwire_fast.errors import DataError
from latentwire_fast.files.json_files import parse_json
from latentwire_fast.files.text import read_unpacked, unpack

TABLES = {".csv": ",", ".tsv": "\t"}
LINES, JSON, PARQUET = (".jsonl", ".ndjson"), (".json",), (".parquet",)
_PACKED, _ARCHIVES = (".xz", ".gz"), (".tar", ".tgz", ".txz")
_LONGEST_CELL = 1 << 27  # bytes; the csv module stops at 131,072 unless told otherwise
# What the names of files say about their split: the last of their words that is one of these.
_SPLITS = {
    "train": "train",
    "dev": "validation",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}


@dataclass(frozen=True)
class RowFile:
    """One file of rows.

    Attributes:
        name: its path, as messages show it.
        stem: its name without endings: `anatomy_dev`.
        content: its bytes, unpacked.
    """

    name: str
    stem: str
    content: bytes

    @property
    def split(self) -> str | None:
        """The split that its name speaks of: `train`, `validation` or `test`."""
        words = self.stem.replace("-", "_").replace(".", "_").lower().split("_")
        return next((_SPLITS[word] for word in reversed(words) if word in _SPLITS), None)


@dataclass(frozen=True)
class FileRow:
    """One row of a file.

    Attributes:
        file, where: what it is of, and the place in it.
        value: a JSON object, or the bytes of a line that holds one.
    """

    file: RowFile
    where: str
    value: Any

    def read(self) -> dict[str, Any]:
        """The row.

        Raises:
            DataError: it is no JSON object.
        """
        value = self.value
        if isinstance(value, bytes):
            value = parse_json(value, name=self.where, error=DataError)
        if not isinstance(value, dict):
            raise DataError(f"{self.where}: is {_kind(value)}, expected an object of columns")
        return value


def row_files(place: Path) -> list[RowFile]:
    """The files of rows of a file, an archive or a folder, in the order of their names.

    Raises:
        DataError: unreadable, or nothing of a known kind there.
    """
    try:
        if place.is_dir():
            paths = sorted(path for path in place.rglob("*") if path.is_file())
            found = [f for path in paths if _endings(path.name)[1] for f in _files_of(path)]
        else:
            found = _files_of(place)
    except OSError as error:
        raise DataError(f"{place}: cannot be read ({error.strerror or error})") from None
    if not found:
        kinds = ", ".join((*TABLES, *LINES, *JSON, *PARQUET))
        raise DataError(f"{place}: holds no file of rows ({kinds}, or packed as .xz or .gz)")
    return found


def _files_of(path: Path) -> list[RowFile]:
    stem, kind = _endings(path.name)
    content = read_unpacked(path)
    if kind in _ARCHIVES:
        return list(_members(path, content))
    return [RowFile(str(path), stem, content)]


def _members(path: Path, content: bytes) -> Iterator[RowFile]:
    """Files of rows in a tar archive. Nothing is written, so its paths need no check."""
    try:
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            members = [m for m in archive.getmembers() if m.isfile()]
            for member in sorted(members, key=lambda m: m.name):
                stem, kind = _endings(member.name)
                file = archive.extractfile(member)
                is_hidden = Path(member.name).name.startswith(".")  # "._x.csv" of a Mac
                if not kind or kind in _ARCHIVES or file is None or is_hidden:
                    continue
                name = f"{path}: {member.name}"
                yield RowFile(name, stem, unpack(file.read(), member.name, name=name))
    except tarfile.TarError as error:
        reason = str(error).partition(":")[0]  # what each kind of packing says follows, in lines
        raise DataError(f"{path}: is no tar archive ({reason}); is the file complete?") from None


def _endings(name: str) -> tuple[str, str]:
    """A file's name without its endings, and the ending that says what it holds; "" if unknown."""
    path = Path(name)
    if path.suffix.lower() in _PACKED:
        path = Path(path.stem)
    kind = path.suffix.lower()
    known = kind in TABLES or kind in (*LINES, *JSON, *PARQUET, *_ARCHIVES)
    return (path.stem, kind) if known else (path.name, "")


def rows_of(file: RowFile, *, headerless: Sequence[str] = ()) -> list[FileRow]:
    """The rows of a file.

    Args:
        headerless: the columns of a table whose first line is a row already. It is a header where
            its first cell is the first of these names.

    Raises:
        DataError: not what the file's name says, or a line of another number of cells.
    """
    kind = _endings(file.name)[1]
    if kind in TABLES:
        return _table_rows(file, TABLES[kind], headerless)
    if kind in PARQUET:
        return _parquet_rows(file)
    if kind not in LINES:
        try:
            return _list_rows(file, parse_json(file.content, name=file.name, error=DataError))
        except DataError as error:
            if "Extra data" not in str(error):  # one object per line, whatever its name
                raise
    return line_rows(file)


def line_rows(file: RowFile) -> list[FileRow]:
    """The rows of JSON lines, which are parsed when they are needed."""
    content = file.content.removeprefix(b"\xef\xbb\xbf")
    return [
        FileRow(file, f"{file.name}: line {number}", line)
        for number, line in enumerate(content.split(b"\n"), start=1)
        if line.strip()
    ]


def _list_rows(file: RowFile, value: Any) -> list[FileRow]:
    """The rows of a JSON list, of `{"data": [...]}`, or of an object of columns, of which each has
    the same keys (MS MARCO's own files)."""
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    if isinstance(value, dict):
        columns = {key: column for key, column in value.items() if isinstance(column, dict)}
        numbers = {tuple(column) for column in columns.values()}
        if len(columns) == len(value) and len(numbers) == 1:
            keys = numbers.pop()
            value = [{name: column[key] for name, column in columns.items()} for key in keys]
        else:
            value = [value]  # one line of JSON lines
    if not isinstance(value, list):
        raise DataError(f"{file.name}: is {_kind(value)}, expected a list of rows")
    return [FileRow(file, f"{file.name}: row {i}", row) for i, row in enumerate(value)]


def _table_rows(file: RowFile, delimiter: str, headerless: Sequence[str]) -> list[FileRow]:
    try:
        text = file.content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file.name}: not UTF-8 text (byte {error.start}); convert it first"
        ) from None
    csv.field_size_limit(_LONGEST_CELL)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows, start = [], 1  # line_num is where a record ends: one may have line breaks in its cells
    columns: list[str] | None = None
    try:
        for cells in reader:
            where, start = f"{file.name}: line {start}", reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if columns is None:
                names = [cell.strip() for cell in cells]
                is_header = not headerless or names[0].lower() == headerless[0]
                columns = names if is_header else list(headerless)
                if is_header:
                    continue
            if len(cells) != len(columns):
                raise DataError(
                    f"{where}: {len(cells)} cells, expected {len(columns)} ({', '.join(columns)})"
                )
            rows.append(FileRow(file, where, dict(zip(columns, cells, strict=True))))
    except csv.Error as error:
        raise DataError(
            f"{file.name}: line {reader.line_num}: not valid CSV ({error}); is the file complete?"
        ) from None
    return rows


def _parquet_rows(file: RowFile) -> list[FileRow]:
    # it comes with `datasets`
    from pyarrow import ArrowException, BufferReader, parquet

    try:
        table = parquet.read_table(BufferReader(file.content))
    except (ArrowException, OSError) as error:
        raise DataError(f"{file.name}: cannot be read as Parquet ({error})") from None
    rows = table.to_pylist()
    return [FileRow(file, f"{file.name}: row {i}", row) for i, row in enumerate(rows)]


def _kind(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    if value is None:
        return "null"
    return names.get(type(value), "a number")


def is_json(path: Path) -> bool:
    """Whether a file's name says that it is JSON, packed or not."""
    return _endings(path.name)[1] in JSON


def has_lines(path: Path) -> bool:
    """Whether a file's name says that it holds JSON lines, packed or not."""
    return _endings(path.name)[1] in LINES


def has_known_name(path: Path) -> bool:
    """Whether a file's name says what it holds."""
    return not path.is_dir() and bool(_endings(path.name)[1])
