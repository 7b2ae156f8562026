"""Question-answering sets of the Hugging Face hub as examples: one small converter per set.

Rows come from the hub, from a folder written by `save_to_disk`, or from a JSON (lines) file of
rows; `datasets` reads all three. A converter returns None for a row that holds no usable question.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from latentwire_fast.data.examples import Example
from latentwire_fast.data.squad import NO_ANSWER
from latentwire_fast.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset

Row = Mapping[str, Any]
Split = Literal["train", "heldout", "all"]

# Seed S001: enough for multi-hop questions, short enough for small readers.
SENTENCES_PER_ITEM, ITEMS, CONTEXT_CHARS = 4, 3, 2000


@dataclass(frozen=True)
class HubSet:
    """Where a set lies on the hub and how its rows become examples.

    Attributes:
        path, config: arguments of `datasets.load_dataset`.
        train, heldout: names of its splits; the same name twice means that it has only one.
        columns: the columns that `convert` reads.
        convert: row to example, or None for a row without a usable answer.
        streaming: too large to download whole.
    """

    path: str
    config: str | None
    train: str
    heldout: str
    columns: tuple[str, ...]
    convert: Callable[[Row], Example | None]
    streaming: bool = False

    def splits(self, split: Split) -> tuple[str, ...]:
        """The set's own names of the splits that make up `split`."""
        if split == "all":
            return tuple(dict.fromkeys((self.train, self.heldout)))
        return (self.train if split == "train" else self.heldout,)


# --- pieces of converters ------------------------------------------------------------------------


def _records(value: Any) -> list[dict[str, Any]]:
    """A nested column as a list of records; some files store it as a record of lists instead."""
    if isinstance(value, Mapping):
        keys = list(value)
        return [dict(zip(keys, row, strict=True)) for row in zip(*value.values(), strict=True)]
    return list(value)


def _distinct(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text.strip() for text in texts if text.strip()))


def _digest(*parts: str) -> str:
    """An id for a row that has none: the same text has the same id in any order of rows."""
    return hashlib.sha256("\x00".join(parts).encode()).hexdigest()[:16]


def _first_items(items: list[str], *, preferred: Iterable[int]) -> list[str]:
    """At most `ITEMS` of the items in their order, the preferred ones before any other."""
    preferred = set(preferred)
    ranked = sorted(range(len(items)), key=lambda i: (i not in preferred, i))
    return [items[i] for i in sorted(ranked[:ITEMS])]


def _clip(text: str) -> str:
    """At most `CONTEXT_CHARS` characters, cut between words."""
    if len(text) <= CONTEXT_CHARS:
        return text
    return text[: CONTEXT_CHARS + 1].rsplit(maxsplit=1)[0]


def _choice_example(identifier: str, question: str, choices: list[str], gold: int) -> Example:
    """A multiple-choice question whose answer is the choice's text.

    Not its letter: the official normalisation deletes the article, and so the answer, "A".
    """
    options = "\n".join(f"- {choice}" for choice in choices)
    return Example(
        id=identifier,
        context=f"{question}\n{options}",
        question="Which of the options is correct?",
        answers=(choices[gold],),
    )


# --- converters ----------------------------------------------------------------------------------


def _squad(row: Row) -> Example | None:
    answers = _distinct(answer["text"] for answer in _records(row["answers"]))
    return Example(
        id=row["id"],
        context=row["context"],
        question=row["question"].strip(),
        answers=answers or (NO_ANSWER,),
    )


def _hotpot_qa(row: Row) -> Example | None:
    """`SENTENCES_PER_ITEM` sentences of `ITEMS` paragraphs, those with supporting facts first."""
    paragraphs = _records(row["context"])
    supporting = {fact["title"] for fact in _records(row["supporting_facts"])}
    texts = [
        f"{p['title']}: " + "".join(p["sentences"][:SENTENCES_PER_ITEM]).strip() for p in paragraphs
    ]
    preferred = (i for i, p in enumerate(paragraphs) if p["title"] in supporting)
    context = _clip("\n".join(_first_items(texts, preferred=preferred)))
    answers = _distinct([row["answer"] or ""])
    return Example(row["id"], context, row["question"].strip(), answers) if answers else None


def _ms_marco(row: Row) -> Example | None:
    """`ITEMS` passages, the one the annotator used first; None without an answer."""
    passages = _records(row["passages"])
    answers = _distinct(a for a in row["answers"] if a != "No Answer Present.")
    if not answers:
        return None
    preferred = (i for i, p in enumerate(passages) if p["is_selected"])
    texts = _first_items([p["passage_text"].strip() for p in passages], preferred=preferred)
    return Example(str(row["query_id"]), _clip("\n".join(texts)), row["query"].strip(), answers)


def _natural_questions(row: Row) -> Example | None:
    """The annotated long answer as context, the short answers as answers; None without both."""
    for annotation in _records(row["annotations"]):
        long = annotation["long_answer"]
        spans = _records(annotation["short_answers"])
        answers = _distinct(text for span in spans for text in span["text"])
        if not answers or long["start_token"] < 0:
            continue
        tokens = _records(row["document"]["tokens"])[long["start_token"] : long["end_token"]]
        context = _clip(" ".join(t["token"] for t in tokens if not t["is_html"]))
        return Example(str(row["id"]), context, row["question"]["text"].strip(), answers)
    return None


def _mmlu(row: Row) -> Example | None:
    question, choices = row["question"].strip(), [str(choice) for choice in row["choices"]]
    identifier = _digest(row["subject"], question, *choices)
    return _choice_example(identifier, question, choices, int(row["answer"]))


def _truthful_qa(row: Row) -> Example | None:
    """MC1: one right choice. Shuffled by the question, since the file lists the right one first."""
    targets = row["mc1_targets"]
    question, choices = row["question"].strip(), list(targets["choices"])
    gold = choices[list(targets["labels"]).index(1)]
    identifier = _digest(question)
    random.Random(identifier).shuffle(choices)
    return _choice_example(identifier, question, choices, choices.index(gold))


_SQUAD_COLUMNS = ("id", "context", "question", "answers")
HUB_SETS: dict[str, HubSet] = {
    "squad": HubSet("rajpurkar/squad", None, "train", "validation", _SQUAD_COLUMNS, _squad),
    "squad_v2": HubSet("rajpurkar/squad_v2", None, "train", "validation", _SQUAD_COLUMNS, _squad),
    "hotpot_qa": HubSet(
        "hotpotqa/hotpot_qa",
        "distractor",
        "train",
        "validation",
        ("id", "question", "answer", "supporting_facts", "context"),
        _hotpot_qa,
    ),
    "ms_marco": HubSet(
        "microsoft/ms_marco",
        "v2.1",
        "train",
        "validation",
        ("answers", "passages", "query", "query_id"),
        _ms_marco,
        streaming=True,
    ),
    "natural_questions": HubSet(
        "google-research-datasets/natural_questions",
        "default",
        "train",
        "validation",
        ("id", "document", "question", "annotations"),
        _natural_questions,
        streaming=True,
    ),
    "mmlu": HubSet(
        "cais/mmlu",
        "all",
        "auxiliary_train",
        "test",
        ("question", "subject", "choices", "answer"),
        _mmlu,
    ),
    "truthful_qa": HubSet(
        "truthfulqa/truthful_qa",
        "multiple_choice",
        "validation",
        "validation",
        ("question", "mc1_targets"),
        _truthful_qa,
    ),
}


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
