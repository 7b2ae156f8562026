"""Passages with ids: files of them, and the passages of any other source."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest

from latentwire_fast.data.passages import load_passages
from latentwire_fast.data.sources import load_examples
from latentwire_fast.data.testbed import make_examples
from latentwire_fast.errors import DataError
from runs import squad_file

LINES = [
    {"id": "a", "text": " One. "},
    {"_id": "b", "title": "Two", "text": "Part two."},
    {"docid": 7, "contents": "Three."},
]
TEXTS = {"a": "One.", "b": "Two: Part two.", "7": "Three."}


def write(path: Path, text: str) -> Path:
    path.write_bytes(lzma.compress(text.encode()) if path.suffix == ".xz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["corpus.jsonl", "corpus.jsonl.xz"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    lines = "\n\n".join(json.dumps(line) for line in LINES)
    path = write(tmp_path / name, f"{lines}\n")
    found = load_passages(f"passages={path}")
    assert found == TEXTS
    assert [*load_passages(f"passages={path}", count=2)] == [*found][:2]
    examples = load_examples(f"passages={path}", split="all", count=None, seed=3)
    assert {e.id: e.context for e in examples} == TEXTS
    assert not any(e.question or e.answers for e in examples)


@pytest.mark.parametrize("name", ["corpus.tsv", "corpus.tsv.xz"])
def test_tables(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, "1\tOne text.\n2\tOther\ttext.\n")
    assert load_passages(f"passages={path}") == {"1": "One text.", "2": "Other\ttext."}


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("c.jsonl", "{", "line 2: Expecting .*; expected a JSON object with an id and a text"),
        ("c.jsonl", '["a"]', "line 2: list is no object"),
        ("c.jsonl", '{"text": "x"}', r"line 2: no id among the keys \['text'\]"),
        ("c.jsonl", '{"id": true, "text": "x"}', "no id among"),
        ("c.jsonl", '{"id": "x", "text": 3}', "no text among"),
        ("c.jsonl", '{"id": "x", "title": "T", "text": " "}', "an empty id or text"),
        ("c.jsonl", '{"id": "a", "text": "y"}', "'a' names two different examples"),
        ("c.tsv", "2 x", "line 2: there is no tab; expected an id, a tab and a text"),
    ],
)
def test_what_is_no_passage_is_named(tmp_path: Path, name: str, line: str, message: str) -> None:
    good = '{"id": "a", "text": "x"}' if name == "c.jsonl" else "1\tx"
    path = write(tmp_path / name, f"{good}\n{line}\n")
    with pytest.raises(DataError, match=message):
        load_passages(f"passages={path}")


def test_a_context_of_several_questions_is_one_passage(tmp_path: Path) -> None:
    path = squad_file(make_examples(5, seed=5, facts=2), tmp_path / "squad.json")
    data = json.loads(path.read_text())
    for paragraph in data["data"][0]["paragraphs"]:
        (first,) = paragraph["qas"]
        paragraph["qas"].append(first | {"id": f"{first['id']}-again"})
    path.write_text(json.dumps(data))
    passages = load_passages(str(path))
    assert len(passages) == 5
    assert passages == load_passages(str(path))


def test_the_testbed_needs_a_count() -> None:
    assert [*load_passages("testbed", count=2)] == ["testbed-heldout-0-0", "testbed-heldout-0-1"]
    with pytest.raises(DataError, match=r"testbed has no end; .*--passages N"):
        load_passages("testbed")
    with pytest.raises(DataError, match="0 passages asked for"):
        load_passages("testbed", count=0)
