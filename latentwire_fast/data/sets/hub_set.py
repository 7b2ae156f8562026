"""Question-answering sets of the Hugging Face hub: rows, and how a row becomes an example.

Rows come from the hub, from a folder written by `save_to_disk`, or from a JSON (lines) file of
rows; `datasets` reads all three. `rows.py` holds what several conversions need.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from latentwire_fast.data.examples import Example, Split
from latentwire_fast.data.sets.base import DataSet, DataSetConfig, Loaded
from latentwire_fast.data.sets.rows import Row
from latentwire_fast.errors import DataError
from latentwire_fast.registry import DATA_SETS

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset


@dataclass(frozen=True)
class HubConfig(DataSetConfig):
    """Where a set lies on the hub.

    Attributes:
        path, subset: arguments of `datasets.load_dataset`.
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
    """A set of rows."""

    config: HubConfig

    @abstractmethod
    def convert(self, row: Row) -> Example | None:
        """A row as an example; None for a row without a usable answer.

        Raises:
            KeyError, IndexError, TypeError, ValueError, AttributeError: a row of another form.
        """

    def load(self, place: Path | None, *, split: Split, count: int | None, seed: int) -> Loaded:
        """The examples of the usable rows.

        Args:
            place: None for the hub; else a folder written by `save_to_disk` (of one split or of
                all), or a JSON or JSON-lines file of rows.

        Raises:
            DataError: nothing readable there, a split that it lacks, other columns, or (when the
                examples are read) a row of another form.
        """
        rows, is_of_split = self._rows(place, split)
        return Loaded(self._converted(rows, seed), is_of_split)

    def _converted(self, rows: Dataset | IterableDataset, seed: int) -> Iterator[Example]:
        for i, row in enumerate(rows.shuffle(seed=seed)):
            try:
                example = self.convert(row)
            except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
                raise DataError(
                    f"{self.config.kind}: row {i} in the order of seed {seed} is not of the form "
                    f"of {self.config.path}: {type(error).__name__}: {error}"
                ) from error
            if example is not None:
                yield example

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
        import datasets

        config = self.config
        try:
            return datasets.load_dataset(
                config.path, config.subset, split=split, streaming=config.is_streamed
            )
        except (OSError, ValueError) as error:
            raise DataError(
                f"hub data set {config.path!r}, split {split!r}, cannot be loaded ({error}); "
                f"without a network, give a copy made with save_to_disk as {config.kind}=FOLDER"
            ) from error

    def _check_columns(self, rows: Dataset | IterableDataset, place: Path | None) -> None:
        found = rows.column_names  # None for a stream whose columns are known only from its rows
        missing = [c for c in self.config.columns if found is not None and c not in found]
        if missing:
            where = f"hub:{self.config.kind}" if place is None else str(place)
            raise DataError(
                f"{where}: no column {missing[0]!r} (found: {', '.join(found)}), so these are not "
                f"rows of {self.config.path}; name their set as NAME=PATH, NAME one of "
                + ", ".join(hub_sets())
            )


def hub_sets() -> list[str]:
    """The names of the sets that have rows on the hub."""
    return [name for name in DATA_SETS.names() if issubclass(DATA_SETS[name], HubSet)]


def _from_disk(path: Path) -> Dataset | DatasetDict:
    import datasets

    try:
        if path.is_dir():
            return datasets.load_from_disk(str(path))
        return datasets.load_dataset("json", data_files=str(path), split="train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{path}: neither a folder written by save_to_disk nor a JSON file of rows ({error})"
        ) from error


def _part(saved: DatasetDict, part: str, path: Path) -> Dataset:
    if part not in saved:
        raise DataError(
            f"{path}: no split {part!r} (found: {', '.join(saved)}); save the whole set, or one "
            "split alone, which is then cut by context"
        )
    return saved[part]
