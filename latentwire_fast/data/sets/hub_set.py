"""Sets of rows, and how a row becomes an example.

Rows come from the Hugging Face hub, from a folder written by `save_to_disk` (`datasets` reads
both), or from local files (`row_files.py`): those that a set's authors give out, and copies of the
hub's. `rows.py` holds what several conversions need.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from latentwire_fast.data.examples import Example, Split
from latentwire_fast.data.row_files import FileRow, RowFile, has_known_name, row_files, rows_of
from latentwire_fast.data.sets.base import DataSet, DataSetConfig, Loaded
from latentwire_fast.data.sets.hub_loading import load_from_hub
from latentwire_fast.data.sets.rows import Row, RowError
from latentwire_fast.errors import DataError
from latentwire_fast.registry import DATA_SETS

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset

_SAVED = ("dataset_info.json", "state.json", "dataset_dict.json")  # of `save_to_disk`


@dataclass(frozen=True)
class HubConfig(DataSetConfig):
    """Where a set lies on the hub.

    Attributes:
        path, subset: arguments of `datasets.load_dataset`; an empty path: only in files.
        columns: the columns that `convert` reads.
        train, heldout: names of its splits; the same name twice means that it has only one.
        is_streamed: too large to download whole.
    """

    path: str
    columns: tuple[str, ...]
    subset: str | None = None
    train: str = "train"
    heldout: str = "validation"
    is_streamed: bool = False

    @property
    def has_splits(self) -> bool:
        """Whether training and held-out rows are apart on the hub."""
        return self.train != self.heldout

    def splits(self, split: Split) -> tuple[str, ...]:
        """The set's own names of the splits that make up `split`."""
        if split == "all":
            return tuple(dict.fromkeys((self.train, self.heldout)))
        return (self.train if split == "train" else self.heldout,)


class HubSet(DataSet):
    """A set of rows.

    Attributes:
        files: its authors' files, for messages.
        headerless: the columns of its tables that have no header.
        keeps_repeats: rows that stand there twice count twice; their ids get a number.
    """

    config: HubConfig
    files: ClassVar[str] = ""
    headerless: ClassVar[tuple[str, ...]] = ()
    keeps_repeats: ClassVar[bool] = False

    @abstractmethod
    def convert(self, row: Row) -> Example | None:
        """A row as an example; None for a row without a usable answer.

        Raises:
            RowError, KeyError, IndexError, TypeError, ValueError, AttributeError: a row of another
                form.
        """

    def from_file(self, row: Row, file: RowFile) -> Row:
        """A row of a local file in the hub's columns; override it where files have others.

        Raises:
            RowError: it has neither.
        """
        return row

    def load(self, place: Path | None, *, split: Split, count: int | None, seed: int) -> Loaded:
        """The examples of the usable rows.

        Args:
            place: None for the hub; else a folder written by `save_to_disk` (of one split or of
                all), a file of rows, or an archive or a folder of such files.

        Raises:
            DataError: nothing readable there, a split that it lacks, other columns, or (when the
                examples are read) a row of another form.
        """
        found: Iterator[Example | None]
        if place is not None and not _is_saved(place):
            rows, is_of_split = self._file_rows(place, split)
            order = np.random.default_rng(seed).permutation(len(rows))
            found = (self._of_file(rows[i]) for i in order)
        else:
            saved, is_of_split = self._rows(place, split)
            found = self._converted(saved, seed, place)
        return Loaded(self._named(found), is_of_split)

    def _named(self, examples: Iterable[Example | None]) -> Iterator[Example]:
        """The examples, with a number behind the ids of repeats."""
        seen: Counter[str] = Counter()
        for example in examples:
            if example is None:
                continue
            seen[example.id] += self.keeps_repeats
            repeats = seen[example.id]
            yield replace(example, id=f"{example.id}-{repeats}") if repeats > 1 else example

    # --- local files -----------------------------------------------------------------------------

    def _file_rows(self, place: Path, split: Split) -> tuple[list[FileRow], bool]:
        """The rows of files, and whether they are of `split` alone: one file is not cut."""
        try:
            files, is_of_split = self._of_split(row_files(place), split, place)
            rows = [row for file in files for row in rows_of(file, headerless=self.headerless)]
        except DataError as error:
            if has_known_name(place):
                raise
            kind = "a folder with files of rows" if place.is_dir() else "a JSON file of rows"
            raise DataError(
                f"{place}: neither a folder written by save_to_disk nor {kind} ({error})"
            ) from None
        if not rows:
            raise DataError(f"{place}: holds no rows")
        return rows, is_of_split

    def _of_split(
        self, files: list[RowFile], split: Split, place: Path
    ) -> tuple[list[RowFile], bool]:
        """Of files whose names speak of several splits, those of one. For training are all but the
        held-out ones and those for tests."""
        names = {file.split for file in files} - {None}
        if len(names) < 2:
            return files, False
        heldout = self.config.heldout if self.config.heldout in names else "test"
        if split == "heldout":
            files = [file for file in files if file.split == heldout]
        elif split == "train":
            files = [file for file in files if file.split not in (heldout, "test")]
        if not files:
            raise DataError(
                f"{place}: no file of split {split!r} (found: {', '.join(sorted(map(str, names)))})"
            )
        return files, True

    def _of_file(self, row: FileRow) -> Example | None:
        return self._example(
            lambda: self.convert(self.from_file(row.read(), row.file)), where=row.where
        )

    def _example(self, convert: Callable[[], Example | None], *, where: str) -> Example | None:
        source = self.config.path or self.config.kind
        try:
            return convert()
        except RowError as error:
            wanted = f"; its files are {self.files}" if self.files else ""
            raise DataError(f"{where}: {error}; not a row of {source}{wanted}") from None
        except DataError:
            raise
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"{where}: is not of the form of {source}: {type(error).__name__}: {error}"
            ) from error

    # --- the hub, and what `datasets` saved ------------------------------------------------------

    def _converted(
        self, rows: Dataset | IterableDataset, seed: int, place: Path | None
    ) -> Iterator[Example | None]:
        name = f"hub:{self.config.kind}" if place is None else str(place)
        order: Sequence[int] = ()
        if hasattr(rows, "__len__"):
            # as `shuffle` draws it
            order = np.random.default_rng(seed).permutation(len(rows)).tolist()
        for i, row in enumerate(rows.shuffle(seed=seed)):
            number = f"row {order[i]}" if len(order) else f"row {i} in the order of seed {seed}"
            yield self._example(partial(self.convert, row), where=f"{name}: {number}")

    def _rows(self, place: Path | None, split: Split) -> tuple[Dataset | IterableDataset, bool]:
        """The rows, and whether they are of `split` alone: a set or a copy with one split is not
        cut."""
        import datasets

        has_splits, names = self.config.has_splits, self.config.splits(split)
        if place is None:
            pieces = [self._from_hub(name) for name in names]
        else:
            saved = _from_disk(place)
            if isinstance(saved, datasets.DatasetDict):
                pieces = [_part(saved, name, place) for name in names]
            else:
                pieces, has_splits = [saved], False
        for piece in pieces:
            self._check_columns(piece, place)
        return datasets.concatenate_datasets(pieces), has_splits

    def _from_hub(self, split: str) -> Dataset | IterableDataset:
        config = self.config
        files = f", or its files ({self.files})" if self.files else ""
        advice = f"give a copy made with save_to_disk as {config.kind}=FOLDER{files}"
        return load_from_hub(
            config.path, config.subset, split=split, streaming=config.is_streamed, advice=advice
        )

    def _check_columns(self, rows: Dataset | IterableDataset, place: Path | None) -> None:
        found = rows.column_names  # None for a stream whose columns are known only from its rows
        missing = [c for c in self.config.columns if found is not None and c not in found]
        if missing:
            where = f"hub:{self.config.kind}" if place is None else str(place)
            raise DataError(
                f"{where}: no column {missing[0]!r} (found: {', '.join(found)}), so these are not "
                f"rows of {self.config.path or self.config.kind}; name their set as NAME=PATH, "
                "NAME one of " + ", ".join(hub_sets())
            )


def hub_sets() -> list[str]:
    """The names of the sets that have rows on the hub."""
    found = [name for name in DATA_SETS.names() if issubclass(DATA_SETS[name], HubSet)]
    return [name for name in found if DATA_SETS[name].Config().path]


def _is_saved(place: Path) -> bool:
    return place.is_dir() and any((place / name).exists() for name in _SAVED)


def _from_disk(path: Path) -> Dataset | DatasetDict:
    import datasets

    try:
        return datasets.load_from_disk(str(path))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{path}: a folder of save_to_disk that cannot be read ({error})"
        ) from error


def _part(saved: DatasetDict, part: str, path: Path) -> Dataset:
    if part not in saved:
        raise DataError(
            f"{path}: no split {part!r} (found: {', '.join(saved)}); save the whole set, or one "
            "split alone, which is then cut by context"
        )
    return saved[part]
