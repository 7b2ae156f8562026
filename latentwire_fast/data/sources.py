"""The examples of a source, for training and for evaluation. `source_names.py` says how a source is
written."""

from __future__ import annotations

import hashlib
import logging
import random
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, islice

from latentwire_fast.config.schema import DataConfig, Mode, RunConfig
from latentwire_fast.data.examples import Example, Split
from latentwire_fast.data.source_names import (
    is_built_in,
    label_of,
    parse_piece,
    split_union,
    weighted_shares,
    with_questions,
)
from latentwire_fast.data.streams import Stream
from latentwire_fast.errors import DataError
from latentwire_fast.registry import DATA_SETS

logger = logging.getLogger(__name__)

# One context in so many is held out where a source has no splits of its own: more of them where
# they are what the run is scored on, few where there is another source for that.
HELDOUT_EVERY, ASIDE_EVERY = 10, 50


def _keep_all(example: Example) -> bool:
    return True


def load_examples(
    spec: str,
    *,
    split: Split,
    count: int | None,
    seed: int,
    data: DataConfig | None = None,
    whole: bool = False,
    keep: Callable[[Example], bool] = _keep_all,
) -> list[Example]:
    """Examples of a source, the same for the same arguments.

    Args:
        spec: the source, as in `source_names.py`.
        split: `train`, `heldout`, or `all` of a file or set. A source without splits is cut by a
            hash of the context, whatever the seed: no passage is in both, and two runs with
            different seeds hold out the same passages.
        count: at most this many (a smaller count is a prefix of a larger one); None for all.
        seed: the order, and so which ones.
        data: the run's settings, of which sets read what is theirs.
        whole: nothing is cut off a source without splits: all of it is of the split.
        keep: examples for which it is false are left out.

    Raises:
        DataError: a source that cannot be read, is malformed, or holds no example of the split.
    """
    if count is not None and count < 1:
        raise DataError(f"count={count}, expected at least 1, or None for all")
    shares = weighted_shares(spec)
    if not shares:
        raise DataError("no data source given; the simplest is: testbed")
    data = data or DataConfig()
    every = None if whole else HELDOUT_EVERY if data.eval_source is None else ASIDE_EVERY

    def load(piece: str, count: int | None) -> list[Example]:
        return _load_one(piece, split, count, seed, data, every=every, keep=keep)

    labels = [label_of(piece) for part, _ in shares for piece in split_union(part)]
    if len(set(labels)) < len(labels):
        raise DataError(f"{spec}: two sources of one name; rename a file, or give each set once")
    rounds = None if count is None else -(-count // sum(weight for _, weight in shares))
    loaded = {
        part: _all_of(part, load, None if rounds is None else rounds * weight, seed=seed)
        for part, weight in shares
    }
    if len(loaded) > 1:
        examples = mix(
            {_share_label(part): found for part, found in loaded.items()},
            weights={_share_label(part): weight for part, weight in shares},
            seed=seed,
        )
        if not examples:
            raise DataError(f"{spec}: a set has fewer examples than its weight; take smaller ones")
    else:
        examples = next(iter(loaded.values()))
    if count is not None and len(examples) < count:
        logger.warning("%s (%s): %d examples, %d asked for", spec, split, len(examples), count)
    return examples[:count]


def heldout_examples(
    config: DataConfig,
    *,
    count: int | None = None,
    seed: int | None = None,
    keep: Callable[[Example], bool] = _keep_all,
) -> list[Example]:
    """Examples with an answer that a run is scored on.

    They come from `eval_source`: all of a file, and of a set with splits the held-out one. Without
    an `eval_source`, they are the held-out part of `source`.

    Args:
        count, seed: in the place of the configuration's own.
        keep: as in `load_examples`.

    Raises:
        DataError: as `load_examples`.
    """
    return load_examples(
        with_questions(config.eval_source or config.source),
        split="heldout",
        count=config.eval_examples if count is None else count,
        seed=config.eval_seed if seed is None else seed,
        data=config,
        whole=config.eval_source is not None,
        keep=lambda example: bool(example.answers) and keep(example),
    )


def training_texts(config: RunConfig, count: int) -> list[str]:
    """The contexts of `training_examples`."""
    return [example.context for example in training_examples(config, count)]


def training_examples(config: RunConfig, count: int) -> list[Example]:
    """One example of each of at most `count` contexts that a run may learn from, drawn with its
    seed.

    Raises:
        DataError: as `load_examples`.
    """
    if not count:
        return []
    data, seed = config.data, config.seed
    is_endless = endless_stream(data, mode=config.mode, seed=seed) is not None
    examples = load_examples(
        data.source, split="train", count=count if is_endless else None, seed=seed, data=data
    )
    first: dict[str, Example] = {}
    for example in draw_contexts(examples, count, seed=seed):
        first.setdefault(example.context, example)
    return [*first.values()]


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


def draw_contexts(examples: Sequence[Example], count: int | None, *, seed: int) -> list[Example]:
    """The examples on `count` contexts drawn at random, in their order; all where it is None."""
    contexts = list(dict.fromkeys(example.context for example in examples))
    if count is None or count >= len(contexts):
        return list(examples)
    chosen = set(random.Random(f"contexts:{seed}").sample(contexts, count))
    return [example for example in examples if example.context in chosen]


def _validation_order(context: str) -> bytes:
    return hashlib.sha256(f"validation: {context}".encode()).digest()


def check_apart(
    training: Iterable[Example], evaluation: Iterable[Example], *, source: str, eval_source: str
) -> None:
    """Raise unless no context of the evaluation is one of the training. White space and capital
    letters make no difference.

    Raises:
        DataError: some are in both.
    """
    trained = {_plain(example.context) for example in training}
    contexts = dict.fromkeys(example.context for example in evaluation)
    both = [context for context in contexts if _plain(context) in trained]
    if both:
        raise DataError(
            f"{len(both)} of {len(contexts)} contexts of the evaluation ({eval_source}) are in the "
            f"training data ({source}) too, such as {both[0][:60]!r}; a score on them would "
            "measure memory: take other articles or another file for one of the two"
        )


def check_contexts(examples: Iterable[Example], *, mode: Mode, source: str) -> None:
    """Raise where a latent would stand for contexts, and questions have none.

    Raises:
        DataError: context mode, and an example of a set without contexts.
    """
    empty = [e for e in examples if e.question and not e.context] if mode == "context" else []
    if empty:
        raise DataError(
            f"{source}: {len(empty)} questions have no context, such as "
            f"{empty[0].question[:60]!r}; in context mode the latent stands for the context: take "
            "a set with passages, or mode=pure"
        )


def _plain(context: str) -> str:
    return " ".join(context.split()).casefold()


def endless_stream(data: DataConfig, *, mode: Mode, seed: int) -> Stream | None:
    """Training batches of a source that has no end; None where its examples are a list."""
    if not is_built_in(data.source):
        return None
    part = DATA_SETS[data.source]
    return part(part.settings(data)).stream(data, mode=mode, seed=seed) if part.is_endless else None


def mix(
    sets: Mapping[str, Sequence[Example]], *, seed: int, weights: Mapping[str, int] | None = None
) -> list[Example]:
    """Shares of several sets, until one of them has too few examples for another round.

    A round holds as many examples of each set as its weight says (one, unless given), in an order
    drawn with `seed`. Ids become `SET/id`, since sets may share ids.
    """
    rng = random.Random(seed)
    sizes = {name: (weights or {}).get(name, 1) for name in sets}
    rounds = min(len(examples) // sizes[name] for name, examples in sets.items())
    mixed: list[Example] = []
    for number in range(rounds):
        of_round = [
            replace(example, id=f"{name}/{example.id}")
            for name, examples in sets.items()
            for example in examples[number * sizes[name] : (number + 1) * sizes[name]]
        ]
        mixed.extend(rng.sample(of_round, len(of_round)))
    return mixed


def in_split(example: Example, split: Split, *, every: int = HELDOUT_EVERY) -> bool:
    """Whether an example of a source without splits of its own, of which one context in `every` is
    held out, belongs to `split`."""
    text = example.context or example.question
    is_heldout = zlib.crc32(text.encode()) % every == 0
    return split == "all" or is_heldout == (split == "heldout")


def _all_of(
    part: str, load: Callable[[str, int | None], list[Example]], count: int | None, *, seed: int
) -> list[Example]:
    """All examples of the pieces of a part, in an order drawn with the seed; at most `count`."""
    pieces = split_union(part)
    if len(pieces) == 1:
        return load(pieces[0], count)
    # A smaller count is a prefix of a larger one, so each piece is loaded whole.
    found = [
        replace(example, id=f"{label_of(piece)}/{example.id}")
        for piece in pieces
        for example in load(piece, None)
    ]
    return random.Random(seed).sample(found, len(found))[:count]


def _share_label(part: str) -> str:
    return "+".join(label_of(piece) for piece in split_union(part))


def _load_one(
    spec: str,
    split: Split,
    count: int | None,
    seed: int,
    data: DataConfig,
    *,
    every: int | None,
    keep: Callable[[Example], bool],
) -> list[Example]:
    piece = parse_piece(spec)
    examples, is_of_split = piece.build(data).load(piece.place, split=split, count=count, seed=seed)
    if not (is_of_split or every is None):
        examples = (example for example in examples if in_split(example, split, every=every))
    name = label_of(spec)
    named = (
        replace(example, set_name=name, language=data.language)
        for example in _distinct(examples, spec)
    )
    chosen = list(islice(filter(keep, named), count))
    if not chosen:
        advice = "look at its rows"
        if not (is_of_split or every is None):
            advice = f"one passage in {every} is held out, so give a file with more of them"
        raise DataError(f"{spec}: no usable example in split {split!r}; {advice}")
    return chosen


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
