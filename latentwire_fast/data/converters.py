"""Rows of the hub's sets to examples."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from latentwire_fast.data.examples import Example, Split
from latentwire_fast.data.squad import NO_ANSWER

Row = Mapping[str, Any]
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
