"""One way to get examples: the built-in testbed, a SQuAD file, a saved `datasets` copy, or the hub.

A source is written as

    testbed              the built-in task
    FILE.json            a SQuAD v1.1 or v2.0 file
    FOLDER               rows in SQuAD's columns, written by `save_to_disk`
    NAME=PATH            rows of the set NAME: a `save_to_disk` folder or a JSON (lines) file
    hub:NAME             the set NAME from the hub
    A,B,...              several of these in equal shares

where NAME is a key of `HUB_SETS`.
"""

from __future__ import annotations

import logging
import random
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from latentwire_fast.config.schema import DataConfig
from latentwire_fast.data import hub
from latentwire_fast.data.converters import HUB_SETS
from latentwire_fast.data.examples import Example, Split
from latentwire_fast.data.squad import load_squad
from latentwire_fast.errors import DataError

logger = logging.getLogger(__name__)

HELDOUT_EVERY = 10  # one context in ten is held out where a source has no splits of its own


def load_examples(
    spec: str, *, split: Split, count: int | None, seed: int, facts: int = 4
) -> list[Example]:
    """Examples of a source, the same for the same arguments.

    Args:
        spec: the source, as in the module's description.
        split: `train`, `heldout`, or `all` of a file or set. A source without splits is cut by a
            hash of the context, whatever the seed: no passage is in both, and two runs with
            different seeds hold out the same passages.
        count: at most this many (a smaller count is a prefix of a larger one); None for all.
        seed: the order, and so which ones.
        facts: testbed only: facts per passage.

    Raises:
        DataError: a source that cannot be read, is malformed, or holds no example of the split.
    """
    if count is not None and count < 1:
        raise DataError(f"count={count}, expected at least 1, or None for all")
    parts = _parts(spec)
    if not parts:
        raise DataError("no data source given; the simplest is: testbed")
    share = None if count is None else -(-count // len(parts))
    loaded = {_label(part): _load_one(part, split, share, seed, facts) for part in parts}
    if len(loaded) < len(parts):
        raise DataError(f"{spec}: two sources of one name; rename a file, or give each set once")
    examples = mix(loaded, seed=seed) if len(parts) > 1 else next(iter(loaded.values()))
    if count is not None and len(examples) < count:
        logger.warning("%s (%s): %d examples, %d asked for", spec, split, len(examples), count)
    return examples[:count]


def heldout_examples(
    config: DataConfig, *, count: int | None = None, seed: int | None = None
) -> list[Example]:
    """What a run is scored on; `count` and `seed` replace the configuration's own.

    Raises:
        DataError: as `load_examples`.
    """
    return load_examples(
        config.source,
        split="heldout",
        count=config.eval_examples if count is None else count,
        seed=config.eval_seed if seed is None else seed,
        facts=config.facts,
    )


def map_paths(spec: str, change: Callable[[str], str]) -> str:
    """A source with its local paths changed; names of sets stay.

    Raises:
        DataError: a changed path holds a comma, which separates sources.
    """
    changed = []
    for part in _parts(spec):
        name, path = _named(part)
        is_path = part != "testbed" and not part.startswith("hub:")
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


def _load_one(spec: str, split: Split, count: int | None, seed: int, facts: int) -> list[Example]:
    if spec == "testbed":
        return _load_testbed(split, count, seed, facts)
    name, path = _parse(spec)
    if not name:
        assert path is not None
        squad = load_squad(path)
        examples: Iterable[Example] = random.Random(seed).sample(squad, len(squad))
        is_cut = False
    else:
        rows, is_cut = hub.open_rows(name, split=split, path=path)
        examples = hub.convert_rows(rows, name=name, seed=seed)
    if not is_cut:
        examples = (example for example in examples if in_split(example, split))
    chosen = list(islice(_distinct(examples, spec), count))
    if not chosen:
        advice = "look at its rows"
        if not is_cut:
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


def _parse(spec: str) -> tuple[str, Path | None]:
    """(set name, path): a SQuAD file has no set name (""), the hub no path."""
    if spec.startswith("hub:"):
        return spec.removeprefix("hub:"), None
    name, rest = _named(spec)
    path = Path(rest)
    if not path.exists():
        raise DataError(
            f"data source {spec!r}: no such file or folder; sources are testbed, a SQuAD JSON "
            "file, a save_to_disk folder, NAME=PATH or hub:NAME, with NAME one of "
            + ", ".join(HUB_SETS)
        )
    return name or ("squad" if path.is_dir() else ""), path


def _load_testbed(split: Split, count: int | None, seed: int, facts: int) -> list[Example]:
    from latentwire_fast.data.testbed import make_examples

    if split == "all" or count is None:
        raise DataError(
            "testbed: is generated without end, so training cannot mix it with other sources; for "
            "a list, give a count, and split train or heldout"
        )
    return make_examples(count, seed=seed, facts=facts, split=split)


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
