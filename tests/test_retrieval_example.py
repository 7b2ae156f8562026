"""The retrieval example: passages of three sources, and answers from texts and from payloads."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from types import ModuleType

import pytest

from latentwire_fast.config.schema import StageConfig
from latentwire_fast.data.passages import load_passages
from latentwire_fast.files.run_folder import RunFolder
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.models.store_writer import write_store
from latentwire_fast.wire.store import StorePlan
from latentwire_fast.wire.store.plan import data_digest
from runs import tiny_config, train_on_the_cpu

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("LATENTWIRE_SHARED", ROOT.parent / "shared")) / "data"


def example(name: str) -> ModuleType:
    """A script of the folder as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_from_texts_and_payloads(
    llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With an untrained reader its scores mean nothing; which passages are found does."""
    example("retrieval_corpus").main("testbed", tmp_path)
    corpus, questions = tmp_path / "corpus.jsonl", lines_of(tmp_path / "questions.jsonl")
    kept = {gold for question in questions[:8] for gold in question["gold"]}
    rows = [row for row in lines_of(corpus) if row["id"] in kept]
    corpus.write_text("\n".join(map(json.dumps, rows)))
    config = tiny_config(llama_folder, stages=(StageConfig("answer", steps=1),))
    run = train_on_the_cpu(config, tmp_path / "run").folder
    model = Interlingua.from_pretrained(RunFolder(run.path).model)
    texts = load_passages(f"passages={corpus}")
    plan = StorePlan(model=model.digest, data=data_digest(texts), passages=len(texts))
    write_store(model, tmp_path / "store", plan, texts, progress=False)
    capsys.readouterr()
    example("retrieval").main(run.path, tmp_path, "llama", (1, 2), 8, 2)
    head, _, *table = capsys.readouterr().out.splitlines()
    assert head == f"{len(texts)} passages, 8 questions, reader llama"
    columns = [line.split() for line in table]
    assert [row[:3] for row in columns] == [
        [k, "100%", way] for k in ("1", "2") for way in ("text", "payload")
    ]
    assert int(columns[3][3]) == 2 * int(columns[1][3]), "bytes of payloads"


@pytest.mark.parametrize(
    ("source", "file", "qrels", "counts"),
    [
        ("hotpot_qa", "hotpot_dev_distractor_v1_first53.json", None, (521, 53)),
        ("trec", "msmarco_dl19_bm25_top100.json.xz", "qrels.dl19-passage.txt", (4297, 43)),
    ],
)
def test_real_files(
    tmp_path: Path, source: str, file: str, qrels: str | None, counts: tuple[int, int]
) -> None:
    if not (DATA / file).exists():
        pytest.skip(f"no copy of {file} here")
    grades = None if qrels is None else DATA / qrels
    example("retrieval_corpus").main(source, tmp_path, DATA / file, grades)
    passages = load_passages(f"passages={tmp_path / 'corpus.jsonl'}")
    questions = lines_of(tmp_path / "questions.jsonl")
    # Two paragraphs or hits with one text are one passage.
    assert counts[0] - 3 <= len(passages) <= counts[0]
    assert len(questions) == counts[1]
    assert {gold for q in questions for gold in q["gold"]} <= {
        row["id"] for row in lines_of(tmp_path / "corpus.jsonl")
    }


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="trec: give --file and --qrels"):
        example("retrieval_corpus").main("trec", tmp_path)
