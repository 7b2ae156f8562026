"""The layouts in which sets are given out: each is read, or refused with its row and field."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import lzma
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from latentwire_fast.data.examples import Example, Split
from latentwire_fast.data.qrels import read_qrels
from latentwire_fast.data.sets.hub_set import hub_sets
from latentwire_fast.data.source_names import with_questions
from latentwire_fast.data.sources import check_contexts, load_examples
from latentwire_fast.data.squad import NO_ANSWER, load_squad
from latentwire_fast.errors import DataError
from latentwire_fast.registry import DATA_SETS


def load(name: str, path: Path, split: Split = "all") -> list[Example]:
    return load_examples(f"{name}={path}", split=split, count=None, seed=0)


def table(path: Path, *rows: Sequence[str]) -> Path:
    buffer = io.StringIO()
    csv.writer(buffer).writerows(rows)
    path.write_text(buffer.getvalue())
    return path


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def document(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


# --- MMLU ----------------------------------------------------------------------------------------

SUM = ["2+2?", "3", "4", "5", "6"]
HEADERS = {
    "official": None,
    "re-export": ["question", "choice0", "choice1", "choice2", "choice3", "answer"],
    "letters": ["Question", "A", "B", "C", "D", "Answer"],
}


@pytest.mark.parametrize("layout", HEADERS)
@pytest.mark.parametrize("answer", ["B", "b", "1"])
def test_mmlu_tables(tmp_path: Path, layout: str, answer: str) -> None:
    header = HEADERS[layout]
    if header is not None and layout == "letters":
        header = ["question", *header[1:-1], "answer"]
    rows = [header] if header else []
    path = table(tmp_path / "high_school_maths_test.csv", *rows, [*SUM, answer])
    (example,) = load("mmlu", path)
    assert (example.answers, example.subject) == (("4",), "high_school_maths")
    assert example.context == "2+2?\n- 3\n- 4\n- 5\n- 6"


def test_mmlu_questions_that_occur_twice_count_twice(tmp_path: Path) -> None:
    path = table(tmp_path / "maths_test.csv", [*SUM, "B"], [*SUM, "B"])
    first, second = load("mmlu", path)
    assert second.id in (f"{first.id}-2", first.id.removesuffix("-2"))


def archive(path: Path, *files: Path) -> Path:
    with tarfile.open(path, "w:xz") as tar:
        for file in files:
            tar.add(file, f"data/{file.name}")
    return path


def test_an_archive_and_a_folder_have_splits(tmp_path: Path) -> None:
    folder = tmp_path / "mmlu"
    folder.mkdir()
    files = [
        table(folder / f"maths_{split}.csv", [f"{split}?", *SUM[1:], "A"])
        for split in ("dev", "val", "test")
    ]
    (folder / "README.txt").write_text("not rows")
    for place in (folder, archive(tmp_path / "mmlu.tar.xz", *files, folder / "README.txt")):
        asked: dict[Split, set[str]] = {
            "train": {"dev?", "val?"},
            "heldout": {"test?"},
            "all": {"dev?", "val?", "test?"},
        }
        for split, expected in asked.items():
            found = {e.context.splitlines()[0] for e in load("mmlu", place, split)}
            assert found == expected
    only = archive(tmp_path / "some.tar.xz", *files[1:])
    (folder / "maths_val.csv").unlink()
    (folder / "maths_dev.csv").unlink()
    table(folder / "maths_train.csv", [*SUM, "A"])
    assert len(load("mmlu", only, "train")) == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[*SUM, "E"]], r"maths_test.csv: line 1: 'answer' is 'E', expected 0 to 3 or A to D"),
        ([[*SUM, "B"], [*SUM, "4"]], r"line 2: 'answer' is '4', expected 0 to 3"),
        ([[*SUM, ""]], r"line 1: 'answer' is '', expected 0 to 3"),
        ([["a\nb", *SUM[1:], "B"], [*SUM, "?"]], r"line 3: 'answer' is '\?'"),
        ([[*SUM[:3], "B"]], r"line 1: 4 cells, expected 6 \(question, A, B, C, D, answer\)"),
        ([["question", "answer"], ["2+2?", "B"]], r"line 2: no 'choices', 'choice0'... or 'A'..."),
    ],
)
def test_bad_mmlu_tables(tmp_path: Path, rows: list[list[str]], message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        load("mmlu", table(tmp_path / "maths_test.csv", *rows))
    assert "\n" not in str(error.value)


# --- HotpotQA ------------------------------------------------------------------------------------

HOTPOT = {
    "_id": "h1",
    "question": "Who?",
    "answer": "Ada",
    "supporting_facts": [["D", 0], ["B", 1]],
    "context": [[title, [f"{title}{i}. " for i in range(6)]] for title in "ABCD"],
    "type": "bridge",
    "level": "hard",
}


def test_hotpot_layouts(tmp_path: Path) -> None:
    """Its own list, JSON lines, facts with more behind them, and facts that are not in the context
    (fullwiki)."""
    (official,) = load("hotpot_qa", document(tmp_path / "dev.json", [HOTPOT]))
    assert official.context == "A: A0. A1. A2. A3.\nB: B0. B1. B2. B3.\nD: D0. D1. D2. D3."
    assert (official.id, official.answers, official.subject) == ("h1", ("Ada",), "bridge")
    assert official.ranking is not None
    assert [p.id for p in official.ranking.passages] == [*"ABCD"]
    assert official.ranking.grades == (("B", 1), ("D", 1))
    widened = HOTPOT | {"supporting_facts": [["D", [0], ["x"], {}], ["B", [1], ["y"], {"id": 3}]]}
    packed = tmp_path / "dev.jsonl.xz"
    packed.write_bytes(lzma.compress((json.dumps(widened) + "\n").encode()))
    assert load("hotpot_qa", packed) == [official]
    elsewhere = HOTPOT | {"_id": 7, "supporting_facts": [["Z", 0]]}
    (fullwiki,) = load("hotpot_qa", lines(tmp_path / "wiki.json", elsewhere))
    assert (fullwiki.id, fullwiki.context[:3]) == ("7", "A: ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": None}, r"line 2: 'context' is null, expected a list of records"),
        ({"context": [["A", "text"]]}, r"line 2: 'sentences' is 'text', expected a list"),
        ({"context": [["A", [3]]]}, r"line 2: 'sentences', item 0 is 3, expected text"),
        ({"supporting_facts": [["D"]]}, r"'supporting_facts', item 0 is \['D'\], expected a pair"),
        ({"question": 3}, r"line 2: 'question' is 3, expected text"),
        ({"answer": ["Ada"]}, r"line 2: 'answer' is \['Ada'\], expected text"),
        ({"question": "so \ud83d"}, r"line 2: 'question' holds half of a surrogate pair"),
    ],
)
def test_bad_hotpot_rows(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = lines(tmp_path / "dev.jsonl", HOTPOT, HOTPOT | {"_id": "h2"} | change)
    with pytest.raises(DataError, match=message) as error:
        load("hotpot_qa", path)
    assert "\n" not in str(error.value)


# --- TruthfulQA ----------------------------------------------------------------------------------

TRUTHFUL_HEADER = [
    *("Type", "Category", "Question", "Best Answer", "Correct Answers", "Incorrect Answers"),
    "Source",
]
TRUTHFUL = ["Adversarial", "Law", "Is it?", "No", "No; It is not; No ", "Yes; It is;", "http://x"]


def test_truthful_qa_layouts(tmp_path: Path) -> None:
    path = table(tmp_path / "TruthfulQA.csv", TRUTHFUL_HEADER, TRUTHFUL)
    path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    (example,) = load("truthful_qa", path)
    assert example.answers == ("No",)
    assert sorted(example.context.splitlines()) == ["- It is", "- No", "- Yes", "Is it?"]
    assert example.choices is not None
    assert example.choices.texts == ("No", "It is not", "Yes", "It is")
    assert (example.choices.correct, example.choices.best) == ((0, 1), 0)
    assert example.choices.single == ("No", "Yes", "It is")
    assert example.subject == "Law"
    generation = {
        "question": "Is it?",
        "category": "Law",
        "best_answer": "No",
        "correct_answers": ["No", "It is not"],
        "incorrect_answers": ["Yes", "It is"],
    }
    assert load("truthful_qa", lines(tmp_path / "rows.jsonl", generation)) == [example]
    official = {
        "question": "Is it?",
        "category": "Law",
        "mc1_targets": {"No": 1, "Yes": 0, "It is": 0},
        "mc2_targets": {"No": 1, "It is not": 1, "Yes": 0, "It is": 0},
    }
    assert load("truthful_qa", document(tmp_path / "mc_task.json", [official])) == [example]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([*TRUTHFUL[:3], "", *TRUTHFUL[4:]], "line 2: no best answer of 'Is it\\?'"),
        ([*TRUTHFUL[:5], " ; ", "x"], "line 2: no incorrect answer of 'Is it\\?'"),
        (TRUTHFUL[:4], "line 2: 4 cells, expected 7"),
    ],
)
def test_bad_truthful_qa_tables(tmp_path: Path, row: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load("truthful_qa", table(tmp_path / "t.csv", TRUTHFUL_HEADER, row))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({"choices": ["a", "b"], "labels": [1]}, "'mc1_targets': 2 choices, but 1 labels"),
        ({"choices": ["a", "b"], "labels": [0, 0]}, "'mc1_targets' has no choice with label 1"),
        ({"choices": "a", "labels": [1]}, "'mc1_targets': 'choices' is 'a', expected a list"),
        (None, "'mc1_targets': no 'choices': null is no object"),
    ],
)
def test_bad_truthful_qa_targets(tmp_path: Path, targets: Any, message: str) -> None:
    path = lines(tmp_path / "rows.jsonl", {"question": "Is it?", "mc1_targets": targets})
    with pytest.raises(DataError, match=message):
        load("truthful_qa", path)


# --- MS MARCO and TREC ---------------------------------------------------------------------------

MARCO = {
    "query_id": 12,
    "query": "what is x",
    "answers": ["It is y."],
    "passages": [{"is_selected": i, "passage_text": f"p{i}", "url": "u"} for i in (0, 1)],
}


def test_ms_marco_layouts(tmp_path: Path) -> None:
    """JSON lines (v1.1), and an object of columns (v2.1)."""
    (example,) = load("ms_marco", lines(tmp_path / "dev_v1.1.json", MARCO))
    assert (example.id, example.context) == ("12", "p0\np1")
    assert example.ranking is not None
    assert example.ranking.grades == (("12-0", 0), ("12-1", 1))
    packed = tmp_path / "dev_v2.1.json.gz"
    columns = {key: {"0": value, "1": value} for key, value in MARCO.items()}
    columns["query_id"]["1"] = 13
    packed.write_bytes(gzip.compress(json.dumps(columns).encode()))
    assert {e.id for e in load("ms_marco", packed)} == {"12", "13"}
    with pytest.raises(DataError, match=r"row 0: these are the hits of a ranker.*give trec=FILE"):
        load("ms_marco", document(tmp_path / "hits.json", HITS))


HITS = [
    {
        "query": f"what is {q}",
        "hits": [
            {"content": f"text {d}", "qid": q, "docid": f"d{d}", "rank": d, "score": 9.0 - d}
            for d in range(5)
        ],
    }
    for q in (1, 2)
]
QRELS = "1 Q0 d3 2\n1 Q0 other 3\n2 Q0 d0 0\n"


def test_trec_joins_hits_and_judgements(tmp_path: Path) -> None:
    path = document(tmp_path / "hits.json", HITS)
    with pytest.raises(DataError, match="no judgements of its queries; put their qrels file"):
        load("trec", path)
    (tmp_path / "qrels.one.txt").write_text(QRELS)
    (tmp_path / "qrels.other.txt").write_text("77 Q0 d1 1\n")
    one = {e.id: e for e in load("trec", path)}["1"]
    assert (one.question, one.context, one.answers) == ("what is 1", "text 0\ntext 1\ntext 2", ())
    assert one.ranking is not None
    assert [(p.id, p.score) for p in one.ranking.passages[:2]] == [("d0", 9.0), ("d1", 8.0)]
    assert one.ranking.grades == (("d3", 2), ("other", 3))
    newer = [
        {
            "query": {"text": row["query"], "qid": q},
            "candidates": [
                {"doc": {"contents": hit["content"]}, "docid": hit["docid"], "score": hit["score"]}
                for hit in row["hits"]
            ],
        }
        for q, row in enumerate(HITS, start=1)
    ]
    assert load("trec", lines(tmp_path / "requests.jsonl", *newer)) == load("trec", path)
    with pytest.raises(DataError, match="no questions to be scored on"):
        with_questions(f"trec={path}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hits": []}, r"row 0: 'hits' is empty; expected a query with its 'hits'"),
        ({"hits": [{"content": "t", "qid": 1, "docid": 3}]}, r"row 0: hit 0: no 'score'"),
        ({"hits": [HITS[0]["hits"][0] | {"content": 5}]}, r"hit 0: 'content' is 5, expected text"),
        ({"hits": HITS[0]["hits"][:1] * 2}, r"'docid' 'd0' occurs twice"),
        ({"hits": [HITS[q]["hits"][q] for q in (0, 1)]}, r"hits of several queries: 'qid' is"),
        ({"query": None}, r"row 0: 'query' is null, expected text"),
    ],
)
def test_bad_hits(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / "qrels.txt").write_text(QRELS)
    with pytest.raises(DataError, match=message):
        load("trec", document(tmp_path / "hits.json", [HITS[0] | change]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 Q0 d3\n", "line 1: 3 columns, expected 4"),
        ("1 Q0 d3 2\n\n1 Q0 d4 high\n", "line 3: grade 'high', expected a whole number"),
        ("1 Q0 d3 2\n1 Q0 d3 1\n", "line 2: passage d3 of query 1 has another grade before"),
    ],
)
def test_bad_qrels(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "qrels.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_qrels(path)


# --- Natural Questions ---------------------------------------------------------------------------


def natural(**more: Any) -> dict[str, Any]:
    spans = [{"start_token": 4, "end_token": 5}]
    long = {"start_token": 1, "end_token": 6, "candidate_index": 0}
    return {
        "example_id": 5,
        "question_text": "which colour",
        "annotations": [{"long_answer": long, "short_answers": spans, "yes_no_answer": "NONE"}],
        **more,
    }


def test_natural_questions_layouts(tmp_path: Path) -> None:
    words = ["x", "<P>", "The", "lamp", "red", "</P>", "y"]
    simplified = natural(document_text=" ".join(words))
    tokens = [{"token": word, "html_token": word[0] == "<"} for word in words]
    expected = Example("5", "The lamp red", "which colour", ("red",))
    for row in simplified, natural(document_tokens=tokens):
        path = tmp_path / "nq.jsonl.gz"
        path.write_bytes(gzip.compress(json.dumps(row).encode()))
        assert load("natural_questions", path) == [expected]
    rows = lines(tmp_path / "NQ-open.dev.jsonl", {"question": "which colour", "answer": ["red"]})
    with pytest.raises(DataError, match=r"line 1: no 'document': .*give nq_open=FILE"):
        load("natural_questions", rows)


def test_questions_without_contexts(tmp_path: Path) -> None:
    rows = [{"question": f"which {i}", "answer": ["red", "red", " "]} for i in range(60)]
    path = lines(tmp_path / "NQ-open.dev.jsonl", *rows)
    examples = load("nq_open", path)
    assert {(e.context, e.answers) for e in examples} == {("", ("red",))}
    parts: list[Split] = ["train", "heldout"]
    assert sum(len(load("nq_open", path, part)) for part in parts) == 60
    check_contexts(examples, mode="pure", source="nq")
    with pytest.raises(DataError, match=r"nq: 60 questions have no context, .*mode=pure"):
        check_contexts(examples, mode="context", source="nq")
    lines(path, *rows[:2], {"question": "which", "answer": "red"})
    with pytest.raises(DataError, match=r"line 3: 'answer' is 'red', expected a list of records"):
        load("nq_open", path)


# --- SubjQA and XSum -----------------------------------------------------------------------------


def test_subj_qa_has_questions_without_answers(tmp_path: Path) -> None:
    header = ["domain", "q_review_id", "question", "review", "human_ans_spans"]
    rows = [
        ["books", "q1", "Good?", "It is good. ANSWERNOTFOUND", "is good"],
        ["books", "q1", "Good?", "It is good. ANSWERNOTFOUND", "is good"],
        ["books", "q1", "Good?", "It is good. ANSWERNOTFOUND", "ANSWERNOTFOUND"],
    ]
    found = load("subj_qa", table(tmp_path / "dev.csv", header, *rows))
    assert sorted(e.answers for e in found) == [("is good",), ("is good",), (NO_ANSWER,)]
    assert {e.context for e in found} == {"It is good."}
    assert len({e.id for e in found}) == 3
    with pytest.raises(DataError, match="line 2: no 'human_ans_spans'"):
        load("subj_qa", table(tmp_path / "dev.csv", header[:-1], rows[0][:-1]))
    with pytest.raises(DataError, match="'subj_qa' is not known"):
        load_examples("hub:subj_qa", split="all", count=None, seed=0)


def test_xsum_without_its_prompt(tmp_path: Path) -> None:
    path = table(
        tmp_path / "xsum.csv",
        ["id", "input", "target", "answer_choices", "eval_type"],
        ["0", "A lamp was lit.\nIt is red. A summary is", "A red lamp.", "None", "generation"],
    )
    (example,) = load("xsum", path)
    assert (example.context, example.answers) == ("A lamp was lit.\nIt is red.", ("A red lamp.",))
    rows = {"document": "A lamp was lit.\nIt is red.", "summary": "A red lamp."}
    assert load("xsum", lines(tmp_path / "xsum.jsonl", rows)) == [example]
    assert DATA_SETS["xsum"].metric == "rougeL"


# --- SQuAD ---------------------------------------------------------------------------------------

QUESTION = {"id": 7, "question": "Where?", "answers": {"text": ["a river"], "answer_start": [1]}}
ROW = {"context": "Town by a river.", **QUESTION}


def test_squad_layouts(tmp_path: Path) -> None:
    """Integer ids and the hub's answers within articles; rows, as lines or as a list."""
    expected = Example("7", "Town by a river.", "Where?", ("a river",))
    paragraph = {"context": "Town by a river.", "qas": [QUESTION]}
    articles = {"data": [{"title": "T", "paragraphs": [paragraph]}]}
    official = document(tmp_path / "dev.json", articles)
    files = [
        official,
        lines(tmp_path / "rows.jsonl", ROW),
        lines(tmp_path / "two.json", ROW, ROW | {"id": 8}),
        document(tmp_path / "list.json", [ROW]),
        document(tmp_path / "data.json", {"version": "1", "data": [ROW]}),
        lines(tmp_path / "texts.jsonl", ROW | {"answers": ["a river", "a river"]}),
    ]
    for path in files:
        assert load_squad(path)[0] == expected
        for spec in (str(path), f"squad={path}"):
            found = load_examples(spec, split="all", count=None, seed=0)
            assert expected in found
    nothing = ROW | {"answers": {"text": [], "answer_start": []}}
    path = lines(tmp_path / "v2.jsonl", nothing)
    assert load_squad(path, no_answer="")[0].answers == ("",)
    assert load("squad_v2", path)[0].answers == (NO_ANSWER,)
    with pytest.raises(DataError, match="holds rows, which have no articles"):
        load_examples(f"{path}[:1]", split="all", count=None, seed=0)


@pytest.mark.parametrize("spec", ["{}", "squad={}"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": None}, r"rows.jsonl: line 3: 'context' is (NoneType|null)"),
        ({"id": None}, r"line 3: 'id' is (NoneType|null), expected"),
        ({"answers": {"text": "a", "answer_start": 1}}, r"line 3(, answers)?: '(text|answers)' is"),
        ({"question": []}, r"line 3: 'question' is (list|\[\]), expected"),
    ],
)
def test_bad_rows_of_squad(tmp_path: Path, spec: str, change: Any, message: str) -> None:
    """F25."""
    path = lines(tmp_path / "rows.jsonl", ROW, ROW | {"id": 8}, ROW | {"id": 9} | change)
    with pytest.raises(DataError, match=message) as error:
        load_examples(spec.format(path), split="all", count=None, seed=0)
    assert "\n" not in str(error.value)


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", b'question,answer\n"open,1\n', r"x.csv: line \d: not valid CSV"),
        ("x.csv", b"question\n\xff\n", r"x.csv: not UTF-8 text \(byte 9\)"),
        (
            "x.jsonl",
            b'{"question": "q", "answer": ["a"]}\n{"a"\n',
            r"x.jsonl: line 2: not valid JSON at line 1",
        ),
        ("x.jsonl", b"[1]\n", r"x.jsonl: line 1: is a list, expected an object of columns"),
        ("x.json", b"3", r"x.json: is a number, expected a list of rows"),
        ("x.tar.xz", b"no archive", r"x.tar.xz: cannot be unpacked"),
        ("x.tar", b"no archive", r"x.tar: is no tar archive"),
        ("x.parquet", b"no table", r"x.parquet: cannot be read as Parquet"),
        ("x.csv", b"", r"x.csv: holds no rows"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        load("nq_open", tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_copy_of_the_hubs_parquet(tmp_path: Path) -> None:
    rows = [{"question": f"q{i}", "answer": ["a"]} for i in range(9)]
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "train-00000.parquet")
    lines(tmp_path / "rows.jsonl", *rows)
    found = load("nq_open", tmp_path / "train-00000.parquet")
    assert len(found) == 9
    assert found == load("nq_open", tmp_path / "rows.jsonl")


def test_rows_of_files_come_in_the_order_of_a_saved_copy() -> None:
    """A seed draws the same examples from a file as `datasets` draws from its rows."""
    rows = datasets.Dataset.from_list([{"i": i} for i in range(50)])
    order = [row["i"] for row in rows.shuffle(seed=3)]
    assert order == np.random.default_rng(3).permutation(50).tolist()


def test_every_set_of_the_hub_says_which_files_it_takes() -> None:
    assert all(DATA_SETS[name].files for name in hub_sets() if name != "squad_v2")
