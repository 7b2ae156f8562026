"""Passages and questions for retrieval.py: of the testbed, HotpotQA, or TREC's deep learning track.

python examples/retrieval_corpus.py testbed runs/corpus
python examples/retrieval_corpus.py hotpot_qa runs/hotpot --file hotpot_dev_distractor_v1.json
python examples/retrieval_corpus.py trec runs/trec --file bm25_top100.json --qrels qrels.txt
"""

import json
import random
import re
from pathlib import Path
from typing import Any, Literal

import tyro

from latentwire_fast.data.testbed import is_heldout, make_passage
from latentwire_fast.errors import DataError
from latentwire_fast.files.json_files import read_json
from latentwire_fast.files.text import read_text

Passages, Questions = dict[str, dict[str, str]], list[dict[str, Any]]


def testbed(passages: Passages, questions: Questions) -> None:
    """Passages without a name in common, so that each question has one answer; questions are asked
    about those with held-out names."""
    rng, used = random.Random(0), set[str]()
    for number in range(4000):
        made = make_passage(rng, split="train" if number % 2 else "heldout")
        names = {*re.findall(r"\b[A-Z][a-z]{5}\b", made.context)}
        if names & used:
            continue
        used |= names
        passages[f"p{number}"] = {"text": made.context}
        for question, answer in made.questions if all(map(is_heldout, names)) else ():
            questions.append({"question": question, "answers": [answer], "gold": [f"p{number}"]})


def hotpot_qa(items: list[Any], passages: Passages, questions: Questions) -> None:
    """All paragraphs of all items together; the gold ones have the supporting facts."""
    for item in items:
        for title, sentences in item["context"]:
            passages[title] = {"title": title, "text": "".join(sentences)}
        gold = sorted({fact[0] for fact in item["supporting_facts"]})
        questions.append({"question": item["question"], "answers": [item["answer"]], "gold": gold})


def trec(queries: list[Any], qrels: str, passages: Passages, questions: Questions) -> None:
    """The passages that were found for all queries together; gold ones have the grade 2 or 3."""
    grades = [line.split() for line in qrels.splitlines()]
    relevant = {(query, passage) for query, _, passage, grade in grades if int(grade) >= 2}
    for query in queries:
        for hit in query["hits"]:
            passages[str(hit["docid"])] = {"text": hit["content"]}
        found = [(str(hit["qid"]), str(hit["docid"])) for hit in query["hits"]]
        gold = [pair[1] for pair in found if pair in relevant]
        questions.append({"question": query["query"], "answers": [], "gold": gold})


def main(
    source: tyro.conf.Positional[Literal["testbed", "hotpot_qa", "trec"]],
    out: tyro.conf.Positional[Path],
    file: Path | None = None,
    qrels: Path | None = None,
) -> None:
    """Write `corpus.jsonl` and `questions.jsonl` into the folder `out`.

    Args:
        source: of what kind.
        out: the folder.
        file: of HotpotQA or of BM25's results for TREC; JSON or JSON lines, packed or not.
        qrels: TREC's grades of passages.
    """
    passages, questions = Passages(), Questions()
    if source == "testbed":
        testbed(passages, questions)
    elif file is None or (source == "trec" and qrels is None):
        raise SystemExit(f"{source}: give --file" + " and --qrels" * (source == "trec"))
    elif source == "hotpot_qa":
        hotpot_qa(records(file), passages, questions)
    elif qrels is not None:
        trec(records(file), read_text(qrels), passages, questions)
    out.mkdir(parents=True, exist_ok=True)
    write(out / "corpus.jsonl", [{"id": i, **passage} for i, passage in passages.items()])
    write(out / "questions.jsonl", questions)
    print(f"{out}: {len(passages):,} passages, {len(questions):,} questions")


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """One JSON object on each line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def records(path: Path) -> list[Any]:
    """The objects of a JSON file, or of one with an object on each line."""
    if ".jsonl" in path.suffixes:
        return [json.loads(line) for line in read_text(path).split("\n")]
    return read_json(path, error=DataError)


if __name__ == "__main__":
    tyro.cli(main)
