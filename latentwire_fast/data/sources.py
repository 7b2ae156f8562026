"""One way to get examples: a built-in set, a SQuAD file, a saved `datasets` copy, or the hub.

A source is written as

    NAME                 a built-in set: `testbed`
    FILE.json            a SQuAD v1.1 or v2.0 file
    FOLDER               rows in SQuAD's columns, written by `save_to_disk`
    NAME=PATH            rows of the set NAME: a `save_to_disk` folder or a JSON (lines) file
    hub:NAME             the set NAME from the hub
    A,B,...              several of these in equal shares

where NAME is a registered data set (`sets/`).
"""

from __future__ import annotations

import hashlib
import logging
import random
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, islice
from pathlib import Path

from latentwire_fast.config.schema import DataConfig, Mode
from latentwire_fast.data.examples import Example, Split
from latentwire_fast.data.sets.base import DataSet
from latentwire_fast.data.sets.hub_set import hub_sets
from latentwire_fast.data.streams import Stream
from latentwire_fast.errors import DataError
from latentwire_fast.registry import DATA_SETS

logger = logging.getLogger(__name__)

BARE_FILE, BARE_FOLDER = "squad_file", "squad"  # what a path without a set's name is
HELDOUT_EVERY = 10  # one context in ten is held out where a source has no splits of its own


def load_examples(
    spec: str,
    *,
    split: Split,
    count: int | None,
    seed: int,
    data: DataConfig | None = None,
) -> list[Example]:
    """Examples of a source, the same for the same arguments.

    Args:
        spec: the source, as in the module's description.
        split: `train`, `heldout`, or `all` of a file or set. A source without splits is cut by a
            hash of the context, whatever the seed: no passage is in both, and two runs with
            different seeds hold out the same passages.
        count: at most this many (a smaller count is a prefix of a larger one); None for all.
        seed: the order, and so which ones.
        data: the run's settings, of which sets read what is theirs.

    Raises:
        DataError: a source that cannot be read, is malformed, or holds no example of the split.
    """
    if count is not None and count < 1:
        raise DataError(f"count={count}, expected at least 1, or None for all")
    parts = _parts(spec)
    if not parts:
        raise DataError("no data source given; the simplest is: testbed")
    share = None if count is None else -(-count // len(parts))
    data = data or DataConfig()
    loaded = {_label(part): _load_one(part, split, share, seed, data) for part in parts}
    if len(loaded) < len(parts):
        raise DataError(f"{spec}: two sources of one name; rename a file, or give each set once")
    examples = mix(loaded, seed=seed) if len(parts) > 1 else next(iter(loaded.values()))
    if count is not None and len(examples) < count:
        logger.warning("%s (%s): %d examples, %d asked for", spec, split, len(examples), count)
    return examples[:count]


def heldout_examples(
    config: DataConfig, *, count: int | None = None, seed: int | None = None
) -> list[Example]:
    """Examples that a run is scored on; `count` and `seed` replace the configuration's own.

    Raises:
        DataError: as `load_examples`.
    """
    return load_examples(
        config.source,
        split="heldout",
        count=config.eval_examples if count is None else count,
        seed=config.eval_seed if seed is None else seed,
        data=config,
    )


def split_validation(
    examples: Sequence[Example], count: int
) -> tuple[list[Example], list[Example]]:
    """What is left to train on, and `count` examples on contexts that are not among it.

    A hash of the context decides, so the same passages are taken in whatever order they come, for
    every seed.

    Raises:
        DataError: more than half of the contexts would be taken.
    """
    contexts = sorted({e.context for e in examples}, key=_validation_order)
    sizes = Counter(example.context for example in examples)
    ends = accumulate(sizes[context] for context in contexts)
    taken = next((i for i, end in enumerate(ends, start=1) if end >= count), len(contexts))
    if 2 * taken > len(contexts):
        raise DataError(
            f"validation: {count} examples would take {taken} of {len(contexts)} training contexts "
            "away; set validation.examples to fewer, or give more data"
        )
    chosen = set(contexts[:taken])
    rest = [e for e in examples if e.context not in chosen]
    return rest, [e for e in examples if e.context in chosen][:count]


def _validation_order(context: str) -> bytes:
    return hashlib.sha256(f"validation: {context}".encode()).digest()


def endless_stream(data: DataConfig, *, mode: Mode, seed: int) -> Stream | None:
    """Training batches of a source that has no end; None where its examples are a list."""
    if not _is_built_in(data.source):
        return None
    part = DATA_SETS[data.source]
    return part(part.settings(data)).stream(data, mode=mode, seed=seed) if part.is_endless else None


def map_paths(spec: str, change: Callable[[str], str]) -> str:
    """A source with its local paths changed; names of sets stay.

    Raises:
        DataError: a changed path holds a comma, which separates sources.
    """
    changed = []
    for part in _parts(spec):
        name, path = _named(part)
        is_path = not _is_built_in(part) and not part.startswith("hub:")
        changed.append(part if not is_path else f"{name}={change(path)}" if name else change(path))
        if "," in changed[-1]:
            raise DataError(
                f"data source {changed[-1]!r}: a comma separates sources; rename the folder, or "
                "link to it from a place without one"
            )
    return ",".join(changed)


def mix(sets: Mapping[str, Sequence[Example]], *, seed: int) -> list[Example]:
    """Equal shares of several sets, as many of each as the smallest has.

    Every run of `len(sets)` examples holds one of each set, in an order drawn with `seed`. Ids
    become `SET/id`, since sets may share ids.
    """
    rng = random.Random(seed)
    rounds = zip(
        *([replace(e, id=f"{name}/{e.id}") for e in examples] for name, examples in sets.items()),
        strict=False,
    )
    mixed: list[Example] = []
    for one_of_each in rounds:
        mixed.extend(rng.sample(one_of_each, len(one_of_each)))
    return mixed


def in_split(example: Example, split: Split) -> bool:
    """Whether an example of a source without splits of its own belongs to `split`."""
    is_heldout = zlib.crc32(example.context.encode()) % HELDOUT_EVERY == 0
    return split == "all" or is_heldout == (split == "heldout")


def _load_one(
    spec: str, split: Split, count: int | None, seed: int, data: DataConfig
) -> list[Example]:
    part, place = _parse(spec)
    examples, is_of_split = part(part.settings(data)).load(
        place, split=split, count=count, seed=seed
    )
    if not is_of_split:
        examples = (example for example in examples if in_split(example, split))
    chosen = list(islice(_distinct(examples, spec), count))
    if not chosen:
        advice = "look at its rows"
        if not is_of_split:
            advice = f"one passage in {HELDOUT_EVERY} is held out, so give a file with more of them"
        raise DataError(f"{spec}: no usable example in split {split!r}; {advice}")
    return chosen


def _parts(spec: str) -> list[str]:
    return [part.strip() for part in spec.split(",") if part.strip()]


def _named(spec: str) -> tuple[str, str]:
    """(set name, path) of NAME=PATH; ("", the whole) where that is a path itself."""
    name, equals, path = spec.partition("=")
    return (name, path) if equals and not Path(spec).exists() else ("", spec)


def _label(spec: str) -> str:
    """A short name that tells one source of a mixture from the others."""
    return Path(spec.removeprefix("hub:").rpartition("=")[2]).stem


def _is_built_in(spec: str) -> bool:
    """Whether this names a set that makes its examples itself."""
    return spec in DATA_SETS and DATA_SETS[spec].is_built_in


def _parse(spec: str) -> tuple[type[DataSet], Path | None]:
    """The data set that a source names, and the path that it gives.

    Raises:
        DataError: no such set, or no such path.
    """
    if _is_built_in(spec):
        return DATA_SETS[spec], None
    if spec.startswith("hub:"):
        return _named_set(spec.removeprefix("hub:"), names=hub_sets()), None
    name, rest = _named(spec)
    path = Path(rest)
    if not path.exists():
        built_in = [name for name in DATA_SETS.names() if DATA_SETS[name].is_built_in]
        raise DataError(
            f"data source {spec!r}: no such file or folder; sources are {', '.join(built_in)}, a "
            "SQuAD JSON file, a save_to_disk folder, NAME=PATH or hub:NAME, with NAME one of "
            + ", ".join(hub_sets())
        )
    if not name:
        return DATA_SETS[BARE_FOLDER if path.is_dir() else BARE_FILE], path
    with_path = [name for name in DATA_SETS.names() if not DATA_SETS[name].is_built_in]
    return _named_set(name, names=with_path), path


def _named_set(name: str, *, names: Sequence[str]) -> type[DataSet]:
    """The data set of that name, if it is among these."""
    if name not in names:
        what = f"data set {name!r} is not known" if name else "no name of a data set behind hub:"
        raise DataError(f"{what}; known are: {', '.join(names)}")
    part: type[DataSet] = DATA_SETS[name]
    return part


def _distinct(examples: Iterable[Example], spec: str) -> Iterator[Example]:
    """The examples without exact repeats.

    Raises:
        DataError: one id for two different examples.
    """
    seen: dict[str, Example] = {}
    for example in examples:
        first = seen.setdefault(example.id, example)
        if first is example:
            yield example
        elif first != example:
            raise DataError(
                f"{spec}: id {example.id!r} names two different examples; ids name predictions, so "
                "make them unique"
            )
