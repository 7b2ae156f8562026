"""How a data source is written: its grammar, and the data set and file that each piece names.

    NAME                 a built-in set: `testbed`
    FILE.json            a SQuAD v1.1 or v2.0 file, or rows in SQuAD's columns (.json.xz too)
    FILE.json[A:B]       articles A to B - 1 of it, in the order of their titles; `[:24]`, `[-8:]`
    text=FILE            the paragraphs of a text file, without questions
    passages=FILE        passages with ids (JSON lines or .tsv), without questions
    FOLDER               rows in SQuAD's columns, written by `save_to_disk`
    NAME=PATH            rows of the set NAME: a file as its authors give it out, a copy of the
                         hub's rows (JSON, CSV, Parquet), an archive or folder of these, or a
                         `save_to_disk` folder
    hub:NAME             the set NAME from the hub
    A+B+...              all of several of these
    A,B,...              several of these in equal shares, as many of each as the smallest has
    A@3,B@1,...          three examples of A for each of B, until one of them has no more

where NAME is a registered data set (`sets/`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from latentwire_fast.config.schema import DataConfig
from latentwire_fast.data.sets.base import DataSet
from latentwire_fast.data.sets.hub_set import hub_sets
from latentwire_fast.errors import DataError
from latentwire_fast.registry import DATA_SETS

BARE_FILE, BARE_FOLDER = "squad_file", "squad"  # what a path without a set's name is
_ARTICLES = re.compile(r"(.+)\[(-?\d*):(-?\d*)\]")
_WEIGHT = re.compile(r"(.+)@([\d.]+)")


@dataclass(frozen=True)
class Piece:
    """One set or file of a source.

    Attributes:
        spec: as it was written.
        part: the data set. place: the path that was given.
        articles: first and end of the slice that was given.
    """

    spec: str
    part: type[DataSet]
    place: Path | None = None
    articles: tuple[int | None, int | None] | None = None

    def build(self, data: DataConfig) -> DataSet:
        """The data set with the settings of a run.

        Raises:
            DataError: articles of a set that has none.
        """
        settings = self.part.settings(data)
        if self.articles is not None:
            if "articles" not in {field.name for field in fields(settings)}:
                raise DataError(f"{self.spec}: only a SQuAD file has articles; leave out the [...]")
            changes: dict[str, object] = {"articles": self.articles}
            settings = replace(settings, **changes)
        return self.part(settings)


def split_shares(spec: str) -> list[str]:
    """The parts of a source that have shares of their own, without their weights.

    Raises:
        DataError: as `weighted_shares`.
    """
    return [part for part, _ in weighted_shares(spec)]


def weighted_shares(spec: str) -> list[tuple[str, int]]:
    """The parts of a source, each with how many of its examples come in a round.

    Raises:
        DataError: a weight that is no whole number, or 0.
    """
    return [_weighted(part.strip()) for part in spec.split(",") if part.strip()]


def _weighted(part: str) -> tuple[str, int]:
    found = _WEIGHT.fullmatch(part)
    if found is None or Path(_named(part)[1]).exists():
        return part, 1
    try:
        weight = int(found[2])
    except ValueError:
        weight = 0
    if weight < 1:
        raise DataError(
            f"data source {part!r}: a weight is a whole number, 1 or more, such as @3 for three "
            "examples a round"
        )
    return found[1], weight


def _with_weight(part: str, weight: int) -> str:
    return part if weight == 1 else f"{part}@{weight}"


def split_union(part: str) -> list[str]:
    """The pieces of a part that are taken whole. A path with a plus sign stays one."""
    name, path = _named(_without_articles(part)[0])
    if "+" not in name and Path(path).exists():
        return [part]
    return [piece.strip() for piece in part.split("+") if piece.strip()]


def with_questions(spec: str) -> str:
    """A source without its plain texts.

    Raises:
        DataError: as `parse_piece`, or it has nothing else.
    """
    shares = []
    for part, weight in weighted_shares(spec):
        pieces = [p for p in split_union(part) if parse_piece(p).part.has_questions]
        shares.append(_with_weight("+".join(pieces), weight) if pieces else "")
    if not any(shares):
        raise DataError(f"{spec} has no questions to be scored on; give a source with --eval-data")
    return ",".join(filter(None, shares))


def map_paths(spec: str, change: Callable[[str], str]) -> str:
    """A source with its local paths changed; names of sets stay.

    Raises:
        DataError: a changed path holds what separates sources: a comma, or in a union a plus sign.
    """
    shares = []
    for part, weight in weighted_shares(spec):
        pieces = split_union(part)
        separators = ",+" if len(pieces) > 1 else ","
        changed = "+".join(_map_path(piece, change, separators) for piece in pieces)
        shares.append(_with_weight(changed, weight))
    return ",".join(shares)


def _map_path(piece: str, change: Callable[[str], str], separators: str) -> str:
    if is_built_in(piece) or piece.startswith("hub:"):
        return piece
    rest, articles = _without_articles(piece)
    name, path = _named(rest)
    path = change(path)
    for separator, word in (",", "comma"), ("+", "plus sign"):
        if separator in separators and separator in path:
            raise DataError(
                f"data source {path!r}: a {word} separates sources; rename the folder, or link to "
                "it from a place without one"
            )
    return (f"{name}={path}" if name else path) + articles


def label_of(piece: str) -> str:
    """A short name that tells one piece of a source from the others."""
    rest, articles = _without_articles(piece.removeprefix("hub:"))
    return Path(rest.rpartition("=")[2]).stem + articles


def metrics_of_sets(spec: str) -> dict[str, str]:
    """By the label of each piece of a source, the score that its set is known by.

    Raises:
        DataError: as `parse_piece`.
    """
    pieces = [piece for part in split_shares(spec) for piece in split_union(part)]
    return {label_of(piece): parse_piece(piece).part.metric for piece in pieces}


def is_built_in(spec: str) -> bool:
    """Whether this names a set that makes its examples itself."""
    return spec in DATA_SETS and DATA_SETS[spec].is_built_in


def parse_piece(spec: str) -> Piece:
    """The data set that a piece names, and the path and articles that it gives.

    Raises:
        DataError: no such set, or no such path.
    """
    if is_built_in(spec):
        return Piece(spec, DATA_SETS[spec])
    if spec.startswith("hub:"):
        return Piece(spec, _named_set(spec.removeprefix("hub:"), names=hub_sets()))
    rest, articles = _without_articles(spec)
    name, rest = _named(rest)
    path = Path(rest)
    if not path.exists():
        built_in = [name for name in DATA_SETS.names() if DATA_SETS[name].is_built_in]
        raise DataError(
            f"data source {spec!r}: no such file or folder; sources are {', '.join(built_in)}, a "
            "SQuAD JSON file (of which [A:B] takes some articles), a save_to_disk folder, "
            "text=FILE, NAME=PATH or hub:NAME, with NAME one of "
            + ", ".join(dict.fromkeys([*hub_sets(), *_with_path()]))
        )
    found = _ARTICLES.fullmatch(spec) if articles else None
    ends = None if found is None else tuple(int(end) if end else None for end in found.groups()[1:])
    if name:
        part = _named_set(name, names=_with_path())
    else:
        part = DATA_SETS[BARE_FOLDER if path.is_dir() else BARE_FILE]
    return Piece(spec, part, path, ends)  # type: ignore[arg-type]


def _with_path() -> list[str]:
    """The names of the sets that are given a path."""
    return [name for name in DATA_SETS.names() if not DATA_SETS[name].is_built_in]


def _without_articles(spec: str) -> tuple[str, str]:
    """A piece without its `[A:B]`, and that; a path that ends so is a path."""
    found = _ARTICLES.fullmatch(spec)
    if found is None or Path(spec).exists():
        return spec, ""
    return found[1], spec[len(found[1]) :]


def _named(spec: str) -> tuple[str, str]:
    """(set name, path) of NAME=PATH; ("", the whole) where that is a path itself."""
    name, equals, path = spec.partition("=")
    return (name, path) if equals and not Path(spec).exists() else ("", spec)


def _named_set(name: str, *, names: Sequence[str]) -> type[DataSet]:
    """The data set of that name, if it is among these."""
    if name not in names:
        what = f"data set {name!r} is not known" if name else "no name of a data set behind hub:"
        raise DataError(f"{what}; known are: {', '.join(names)}")
    part: type[DataSet] = DATA_SETS[name]
    return part
