"""Question-answering sets of the Hugging Face hub as examples: one small converter per set.

Rows come from the hub, from a folder written by `save_to_disk`, or from a JSON (lines) file of
rows; `datasets` reads all three. A converter returns None for a row that holds no usable question.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from latentwire_fast.data.converters import HUB_SETS, HubSet
from latentwire_fast.data.examples import Example, Split
from latentwire_fast.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset


# --- converters ----------------------------------------------------------------------------------


# --- rows ----------------------------------------------------------------------------------------


def hub_set(name: str) -> HubSet:
    """The set of that name.

    Raises:
        DataError: an unknown name.
    """
    if name not in HUB_SETS:
        raise DataError(f"data set {name!r} is not known; known are: {', '.join(HUB_SETS)}")
    return HUB_SETS[name]


def open_rows(
    name: str, *, split: Split, path: Path | None = None
) -> tuple[Dataset | IterableDataset, bool]:
    """The rows of a set, from the hub or from a saved copy.

    Args:
        name: a key of `HUB_SETS`.
        path: None for the hub; else a folder written by `save_to_disk` (of one split or of all), or
            a JSON or JSON-lines file of rows.

    Returns:
        The rows, and whether they are of `split` alone; if not (a set or a copy with one split),
        the caller cuts them.

    Raises:
        DataError: an unknown name, nothing readable there, a split that it lacks, or other columns.
    """
    import datasets

    source = hub_set(name)
    has_splits = source.train != source.heldout
    parts = source.splits(split)
    if path is None:
        pieces = [_from_hub(name, source, part) for part in parts]
    else:
        saved = _from_disk(path)
        if isinstance(saved, datasets.DatasetDict):
            pieces = [_part(saved, part, path) for part in parts]
        else:
            pieces, has_splits = [saved], False
    for piece in pieces:
        _check_columns(piece, source, where=f"hub:{name}" if path is None else str(path))
    return datasets.concatenate_datasets(pieces), has_splits


def convert_rows(rows: Dataset | IterableDataset, *, name: str, seed: int) -> Iterator[Example]:
    """Examples of the rows in an order set by `seed`; rows without a usable question are left out.

    Raises:
        DataError: a row of another form.
    """
    source = hub_set(name)
    for i, row in enumerate(rows.shuffle(seed=seed)):
        try:
            example = source.convert(row)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"{name}: row {i} in the order of seed {seed} is not of the form of {source.path}: "
                f"{type(error).__name__}: {error}"
            ) from error
        if example is not None:
            yield example


def _from_hub(name: str, source: HubSet, part: str) -> Dataset | IterableDataset:
    import datasets

    try:
        return datasets.load_dataset(
            source.path, source.config, split=part, streaming=source.streaming
        )
    except (OSError, ValueError) as error:
        raise DataError(
            f"hub data set {source.path!r}, split {part!r}, cannot be loaded ({error}); without a "
            f"network, give a copy made with save_to_disk as {name}=FOLDER"
        ) from error


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


def _check_columns(rows: Dataset | IterableDataset, source: HubSet, *, where: str) -> None:
    found = rows.column_names  # None for a stream whose columns are known only from its rows
    missing = [c for c in source.columns if found is not None and c not in found]
    if missing:
        raise DataError(
            f"{where}: no column {missing[0]!r} (found: {', '.join(found)}), so these are not rows "
            f"of {source.path}; name their set as NAME=PATH, NAME one of {', '.join(HUB_SETS)}"
        )
