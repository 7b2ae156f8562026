"""Sources of examples: SQuAD files and their faults, hub converters, splits, mixtures."""

from __future__ import annotations

import codecs
import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
from huggingface_hub import constants

from latentwire_fast.config.schema import DataConfig
from latentwire_fast.data import sources
from latentwire_fast.data.examples import Example, Split
from latentwire_fast.data.sets import hub_loading
from latentwire_fast.data.sets.hub_set import hub_sets
from latentwire_fast.data.sets.rows import CONTEXT_CHARS
from latentwire_fast.data.source_names import map_paths, with_questions
from latentwire_fast.data.sources import in_split, load_examples, mix
from latentwire_fast.data.squad import NO_ANSWER, load_squad
from latentwire_fast.errors import DataError
from latentwire_fast.files.text import read_text
from latentwire_fast.registry import DATA_SETS
from real_files import real_file


@pytest.fixture(autouse=True)
def _private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def squad_file(path: Path, *, contexts: int = 3, per_context: int = 2) -> Path:
    """A well-formed v1.1 file."""
    paragraphs = [
        {
            "context": f"Town {c} lies by the river {c}.",
            "qas": [
                {
                    "id": f"q{c}-{q}",
                    "question": f" Which river, {q}? ",
                    "answers": [
                        {"text": f"river {c}", "answer_start": 19},
                        {"text": f"the river {c}", "answer_start": 15},
                        {"text": f"river {c}", "answer_start": 19},
                    ],
                }
                for q in range(per_context)
            ],
        }
        for c in range(contexts)
    ]
    path.write_text(
        json.dumps({"version": "1.1", "data": [{"title": "T", "paragraphs": paragraphs}]})
    )
    return path


# --- SQuAD files ---------------------------------------------------------------------------------


def test_squad_v1(tmp_path: Path) -> None:
    examples = load_squad(squad_file(tmp_path / "dev.json"))
    assert [e.id for e in examples] == ["q0-0", "q0-1", "q1-0", "q1-1", "q2-0", "q2-1"]
    assert examples[0] == Example(
        id="q0-0",
        context="Town 0 lies by the river 0.",
        question="Which river, 0?",
        answers=("river 0", "the river 0"),
    )


def test_squad_v2_unanswerable(tmp_path: Path) -> None:
    path = squad_file(tmp_path / "dev.json")
    data = json.loads(path.read_text())
    data["data"][0]["paragraphs"][0]["qas"][0] |= {"answers": [], "is_impossible": True}
    path.write_text(json.dumps(data))
    assert load_squad(path)[0].answers == (NO_ANSWER,)
    assert load_squad(path, no_answer="")[0].answers == ("",)


def test_answers_come_without_outer_space(tmp_path: Path) -> None:
    """It would become a token of its own behind the anchor."""
    path = squad_file(tmp_path / "dev.json", contexts=1, per_context=1)
    data = json.loads(path.read_text())
    texts = [" river 0 ", "", "river 0\n", "the river 0"]
    question = data["data"][0]["paragraphs"][0]["qas"][0]
    question["answers"] = [{"text": text, "answer_start": 0} for text in texts]
    path.write_text(json.dumps(data))
    assert load_squad(path)[0].answers == ("river 0", "the river 0")


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    plain = squad_file(tmp_path / "dev.json")
    marked = tmp_path / "marked.json"
    marked.write_bytes(codecs.BOM_UTF8 + plain.read_bytes())
    assert load_squad(marked) == load_squad(plain)
    note = tmp_path / "note.txt"
    note.write_bytes(codecs.BOM_UTF8 + "Nulnak naïf\n".encode())
    assert read_text(note) == "Nulnak naïf"


def test_passages_of_one_split_only_say_what_to_do(tmp_path: Path) -> None:
    path = squad_file(tmp_path / "dev.json", contexts=1)
    split = "train" if in_split(load_squad(path)[0], "heldout") else "heldout"
    with pytest.raises(DataError, match=f"split '{split}'; one passage in 10 is held out, so give"):
        load_examples(str(path), split=split, count=None, seed=0)


def test_the_endless_testbed_is_in_no_mixture_for_training(tmp_path: Path) -> None:
    path = squad_file(tmp_path / "dev.json", contexts=40)
    mixture = f"testbed,{path}"
    assert len(load_examples(mixture, split="heldout", count=4, seed=0)) == 4
    with pytest.raises(DataError, match="training cannot mix it with other sources"):
        load_examples(mixture, split="train", count=None, seed=0)


def _edit(path: tuple[Any, ...], value: Any) -> Any:
    """A change of the JSON value at `path`; None removes it."""

    def apply(data: Any) -> Any:
        data = copy.deepcopy(data)
        target = data
        for key in path[:-1]:
            target = target[key]
        if value is None:
            del target[path[-1]]
        else:
            target[path[-1]] = value
        return data

    return apply


_Q = ("data", 0, "paragraphs", 1, "qas", 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_edit(("data",), None), r"dev.json: no 'data'"),
        (_edit(("data",), {}), r"'data' is dict, expected list"),
        (_edit(("data", 0, "paragraphs"), None), r"article 0: no 'paragraphs'"),
        (_edit((*_Q[:4], "context"), 3), r"article 0, paragraph 1: 'context' is int"),
        (_edit((*_Q[:4], "qas"), None), r"paragraph 1: no 'qas'"),
        (_edit((*_Q, "question"), None), r"paragraph 1, question 1: no 'question'"),
        (_edit((*_Q, "id"), 7.5), r"question 1: 'id' is float, expected str"),
        (_edit((*_Q, "id"), True), r"question 1: 'id' is bool, expected str"),
        (_edit((*_Q, "answers"), []), r"question 1: no answer with a text; .*is_impossible"),
        (_edit((*_Q, "answers"), [{"text": " \n"}]), r"question 1: no answer with a text"),
        (_edit((*_Q, "answers", 2), "river"), r"question 1, answer 2: no 'text' \(found str\)"),
        (_edit((*_Q, "id"), "q0-1"), r"question 1: id 'q0-1' .*article 0, paragraph 0, question 1"),
        (
            _edit((*_Q[:4], "context"), "so \ud83d"),
            r"'context' holds half of a surrogate .*character 3",
        ),
        (_edit(("data",), []), r"holds no questions"),
        (lambda data: [data], r"found list"),
        # a file of predictions in its place, with all their ids, is still one line to read
        (
            lambda data: {f"id{i:05}": "answer" for i in range(9000)},
            r"found 9,000 keys, first \['id00000', [^]]{42}\]",
        ),
    ],
)
def test_malformed_squad_says_where(tmp_path: Path, change: Any, message: str) -> None:
    path = squad_file(tmp_path / "dev.json")
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(DataError, match=message):
        load_squad(path)


def test_unreadable_squad(tmp_path: Path) -> None:
    path = squad_file(tmp_path / "dev.json")
    path.write_text(path.read_text()[:100])
    with pytest.raises(DataError, match=r"not valid JSON at line 1, column \d+"):
        load_squad(path)
    path.write_bytes(b'{"data": "\xff"}')
    with pytest.raises(DataError, match=r"not UTF-8 .*byte 10"):
        load_squad(path)
    path.write_text("[" * 10**5)
    with pytest.raises(DataError, match="cannot be read as JSON"):
        load_squad(path)
    with pytest.raises(DataError, match="no such file"):
        load_squad(tmp_path / "none.json")
    with pytest.raises(DataError, match="is a folder"):
        load_squad(tmp_path)


# --- converters ----------------------------------------------------------------------------------

HOTPOT = {
    "id": "h1",
    "question": "Who? ",
    "answer": "Ada",
    "supporting_facts": {"title": ["D", "B"], "sent_id": [0, 1]},
    "context": {
        "title": ["A", "B", "C", "D"],
        "sentences": [[f"{t}{i}. " for i in range(6)] for t in "ABCD"],
    },
}
MARCO = {
    "query_id": 12,
    "query": "what is x",
    "answers": ["It is y.", "It is y."],
    "passages": {
        "is_selected": [0, 0, 0, 1, 0],
        "passage_text": [f"passage {i}" for i in range(5)],
        "url": ["u"] * 5,
    },
}
NQ_TOKENS = [("<P>", True), ("The", False), ("lamp", False), ("is", False), ("red", False)]
NATURAL = {
    "id": "n1",
    "question": {"text": "which colour", "tokens": ["which", "colour"]},
    "document": {
        "tokens": {
            "token": ["x", *(t for t, _ in NQ_TOKENS), "y"],
            "is_html": [False, *(h for _, h in NQ_TOKENS), False],
        }
    },
    "annotations": [
        {"long_answer": {"start_token": -1, "end_token": -1}, "short_answers": []},
        {
            "long_answer": {"start_token": 1, "end_token": 6},
            "short_answers": {"text": [["red"]], "start_token": [[5]]},
        },
    ],
}
MMLU = {"question": "2+2?", "subject": "maths", "choices": ["3", "4", "5", "A"], "answer": 1}
TRUTHFUL = {
    "question": "Is it?",
    "mc1_targets": {"choices": [f"option {i}" for i in range(6)], "labels": [1, 0, 0, 0, 0, 0]},
}
NQ_OPEN = {"question": "which colour", "answer": ["red", "Red"]}
XSUM = {"document": "A lamp was lit.\nIt is red.", "summary": "A red lamp was lit.", "id": "x1"}
SQUAD = {
    "id": "s1",
    "context": "Town by a river.",
    "question": "Where?",
    "answers": {"text": ["a river", "river"], "answer_start": [8, 10]},
}


def convert_or_none(name: str, row: dict[str, Any]) -> Example | None:
    return DATA_SETS[name](DATA_SETS.config(name)).convert(row)


def convert(name: str, row: dict[str, Any]) -> Example:
    example = convert_or_none(name, row)
    assert example is not None
    return example


def test_squad_rows() -> None:
    assert convert("squad", SQUAD).answers == ("a river", "river")
    as_records = SQUAD | {"answers": [{"text": "a river", "answer_start": 8}]}
    assert convert("squad", as_records).answers == ("a river",)
    nothing = SQUAD | {"answers": {"text": [], "answer_start": []}}
    assert convert("squad_v2", nothing).answers == (NO_ANSWER,)


def test_hotpot_keeps_the_supporting_paragraphs() -> None:
    example = convert("hotpot_qa", HOTPOT)
    assert example.context == "A: A0. A1. A2. A3.\nB: B0. B1. B2. B3.\nD: D0. D1. D2. D3."
    assert (example.id, example.question, example.answers) == ("h1", "Who?", ("Ada",))
    records = [
        dict(zip(("title", "sentences"), pair, strict=True))
        for pair in zip(*HOTPOT["context"].values(), strict=True)
    ]
    assert convert("hotpot_qa", HOTPOT | {"context": records}) == example
    assert convert_or_none("hotpot_qa", HOTPOT | {"answer": None}) is None


def test_contexts_are_cut_between_words() -> None:
    long = {"title": ["A"], "sentences": [["word " * 900]]}
    context = convert("hotpot_qa", HOTPOT | {"context": long}).context
    assert len(context) <= CONTEXT_CHARS
    assert context.endswith(" word")
    assert len(context) > CONTEXT_CHARS - 6


def test_ms_marco_keeps_the_selected_passage() -> None:
    example = convert("ms_marco", MARCO)
    assert example.context == "passage 0\npassage 1\npassage 3"
    assert (example.id, example.answers) == ("12", ("It is y.",))
    assert convert_or_none("ms_marco", MARCO | {"answers": ["No Answer Present."]}) is None


def test_natural_questions_takes_the_long_answer_without_markup() -> None:
    example = convert("natural_questions", NATURAL)
    assert example == Example("n1", "The lamp is red", "which colour", ("red",))
    none = NATURAL | {"annotations": NATURAL["annotations"][:1]}
    assert convert_or_none("natural_questions", none) is None


def test_choices_become_texts() -> None:
    example = convert("mmlu", MMLU)
    assert example.answers == ("4",)
    assert example.context == "2+2?\n- 3\n- 4\n- 5\n- A"
    assert convert("mmlu", MMLU | {"subject": "other"}).id != example.id


def test_truthful_qa_does_not_leak_the_order() -> None:
    places: Counter[int] = Counter()
    for i in range(60):
        example = convert("truthful_qa", TRUTHFUL | {"question": f"Is it {i}?"})
        assert example.answers == ("option 0",)
        places[example.context.splitlines().index("- option 0")] += 1
        assert example == convert("truthful_qa", TRUTHFUL | {"question": f"Is it {i}?"})
    assert len(places) == 6  # the right option is seen in every place


# --- saved copies and the hub --------------------------------------------------------------------

ROWS = {
    "squad": SQUAD,
    "squad_v2": SQUAD,
    "hotpot_qa": HOTPOT,
    "ms_marco": MARCO,
    "natural_questions": NATURAL | {"annotations": NATURAL["annotations"][1:]},
    "mmlu": MMLU,
    "truthful_qa": TRUTHFUL,
    "nq_open": NQ_OPEN,
    "xsum": XSUM,
}


@pytest.mark.parametrize("name", sorted(hub_sets()))
def test_saved_folder_and_json_rows_agree(tmp_path: Path, name: str) -> None:
    """What `datasets` does to nested columns on the way through arrow does not matter."""
    expected = convert(name, ROWS[name])
    datasets.Dataset.from_list([ROWS[name]]).save_to_disk(tmp_path / "folder")
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[name]) + "\n")
    for path in ("folder", "rows.jsonl"):
        loaded = load_examples(f"{name}={tmp_path / path}", split="all", count=None, seed=0)
        assert loaded == [expected]


def saved_squad(path: Path, count: int, prefix: str = "s") -> Path:
    rows = [SQUAD | {"id": f"{prefix}{i}", "context": f"Town {i}"} for i in range(count)]
    datasets.Dataset.from_list(rows).save_to_disk(path)
    return path


def test_bare_folder_is_squad(tmp_path: Path) -> None:
    folder = saved_squad(tmp_path / "rows", 5)
    loaded = load_examples(str(folder), split="all", count=None, seed=0)
    assert {e.id for e in loaded} == {f"s{i}" for i in range(5)}


def test_saved_splits_are_used(tmp_path: Path) -> None:
    parts = {
        "train": datasets.Dataset.from_list([SQUAD | {"id": f"t{i}"} for i in range(4)]),
        "validation": datasets.Dataset.from_list([SQUAD | {"id": "v0"}]),
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "set")
    source = str(tmp_path / "set")
    assert len(load_examples(source, split="train", count=None, seed=0)) == 4
    assert [e.id for e in load_examples(source, split="heldout", count=None, seed=0)] == ["v0"]
    assert len(load_examples(source, split="all", count=None, seed=0)) == 5
    datasets.DatasetDict({"train": parts["train"]}).save_to_disk(tmp_path / "half")
    with pytest.raises(DataError, match=r"no split 'validation' \(found: train\)"):
        load_examples(str(tmp_path / "half"), split="heldout", count=None, seed=0)


@pytest.mark.parametrize(("split", "asked"), [("train", "train"), ("heldout", "validation")])
def test_hub_is_asked_for_the_right_split(
    monkeypatch: pytest.MonkeyPatch, split: Split, asked: str
) -> None:
    calls = []

    def load_dataset(path: str, config: str | None, **options: Any) -> datasets.Dataset:
        calls.append((path, config, options))
        return datasets.Dataset.from_list([HOTPOT])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [e.id for e in load_examples("hub:hotpot_qa", split=split, count=9, seed=0)] == ["h1"]
    options = {"split": asked, "streaming": False}
    assert calls == [("hotpotqa/hotpot_qa", "distractor", options)]


def test_streamed_set(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [MARCO | {"query_id": i} for i in range(50)]
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream)
    first = load_examples("hub:ms_marco", split="train", count=5, seed=1)
    assert first == load_examples("hub:ms_marco", split="train", count=10, seed=1)[:5]
    assert [e.id for e in first] != ["0", "1", "2", "3", "4"]


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"rajpurkar/squad.*no route.*squad=FOLDER"):
        load_examples("hub:squad", split="train", count=1, seed=0)


def test_without_a_network_the_cache_is_asked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` would try six times, for 25 seconds."""
    asked = []

    def load_dataset(*_: Any, **__: Any) -> None:
        asked.append((datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE))
        raise ConnectionError("not in the cache")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(hub_loading, "is_offline", lambda: False)
    monkeypatch.setattr(hub_loading, "hub_answers", lambda: False)
    before = constants.HF_HUB_OFFLINE
    message = r"does not answer.*hotpot_qa=FOLDER, or its files \(hotpot_dev_distractor_v1.json"
    with pytest.raises(DataError, match=message):
        load_examples("hub:hotpot_qa", split="train", count=1, seed=0)
    assert asked == [(True, True)]
    assert before == constants.HF_HUB_OFFLINE


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere.json", "no such file or folder; sources are testbed"),
        ("hub:imagenet", "'imagenet' is not known; known are: squad,"),
        ("hub:", "no name of a data set behind hub:; known are: squad,"),  # F31
        ("imagenet={rows}", "'imagenet' is not known"),
        ("mmlu={rows}", r"no column 'subject' \(found: id, context"),
        ("{empty}", "neither a folder written by save_to_disk"),
        ("{text}", "not valid JSON"),
        ("squad={text}", "nor a JSON file of rows"),
        (" , ", "no data source given"),
        ("{rows},squad={rows}", "two sources of one name"),
    ],
)
def test_bad_sources(tmp_path: Path, spec: str, message: str) -> None:
    saved_squad(tmp_path / "rows", 2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    places = {
        "rows": tmp_path / "rows",
        "empty": tmp_path / "empty",
        "text": tmp_path / "notes.txt",
    }
    with pytest.raises(DataError, match=message):
        load_examples(spec.format(**places), split="all", count=1, seed=0)


def test_row_of_another_form(tmp_path: Path) -> None:
    datasets.Dataset.from_list([SQUAD | {"answers": "river"}]).save_to_disk(tmp_path / "rows")
    with pytest.raises(
        DataError, match=r"row 0: 'answers' is 'river', expected a list of .* rajpurkar/squad"
    ):
        load_examples(str(tmp_path / "rows"), split="all", count=1, seed=0)


def test_repeats_are_dropped_and_clashes_refused(tmp_path: Path) -> None:
    datasets.Dataset.from_list([SQUAD, SQUAD]).save_to_disk(tmp_path / "repeat")
    assert len(load_examples(str(tmp_path / "repeat"), split="all", count=None, seed=0)) == 1
    datasets.Dataset.from_list([SQUAD, SQUAD | {"question": "?"}]).save_to_disk(tmp_path / "clash")
    with pytest.raises(DataError, match="id 's1' names two different examples"):
        load_examples(str(tmp_path / "clash"), split="all", count=None, seed=0)


# --- splits, order, mixtures ---------------------------------------------------------------------


def test_split_keeps_passages_apart_whatever_the_seed(tmp_path: Path) -> None:
    path = squad_file(tmp_path / "dev.json", contexts=200)
    train = load_examples(str(path), split="train", count=None, seed=0)
    heldout = load_examples(str(path), split="heldout", count=None, seed=7)
    assert len(train) + len(heldout) == 400
    assert not {e.context for e in train} & {e.context for e in heldout}
    assert 0.05 < len(heldout) / 400 < 0.2
    assert all(in_split(e, "heldout") and in_split(e, "all") for e in heldout)


def test_order_follows_the_seed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = str(squad_file(tmp_path / "dev.json", contexts=20))
    ten = load_examples(path, split="all", count=10, seed=3)
    assert ten == load_examples(path, split="all", count=10, seed=3)
    assert ten == load_examples(path, split="all", count=25, seed=3)[:10]
    assert ten != load_examples(path, split="all", count=10, seed=4)
    assert not caplog.records
    assert len(load_examples(path, split="all", count=99, seed=3)) == 40
    assert "40 examples, 99 asked for" in caplog.text


def test_nothing_of_the_split(tmp_path: Path) -> None:
    path = squad_file(tmp_path / "dev.json", contexts=1)
    parts = [s for s in ("train", "heldout") if in_split(load_squad(path)[0], s)]
    other = "heldout" if parts == ["train"] else "train"
    with pytest.raises(DataError, match="no usable example in split"):
        load_examples(str(path), split=other, count=1, seed=0)
    with pytest.raises(DataError, match="count=0"):
        load_examples(str(path), split="all", count=0, seed=0)


def test_testbed_source() -> None:
    examples = load_examples("testbed", split="heldout", count=3, seed=5, data=DataConfig(facts=2))
    assert examples == load_examples(
        "testbed", split="heldout", count=3, seed=5, data=DataConfig(facts=2)
    )
    assert all(e.context.count(".") == 2 for e in examples)
    with pytest.raises(DataError, match="give a count"):
        load_examples("testbed", split="all", count=3, seed=5)


def test_mix_is_balanced_at_every_point() -> None:
    def make(n: int) -> list[Example]:
        return [Example(str(i), "c", "q", ("a",)) for i in range(n)]

    mixed = mix({"x": make(30), "y": make(20), "z": make(25)}, seed=0)
    assert len(mixed) == 60  # as many rounds as the smallest set has
    for start in range(0, 60, 3):
        assert {e.id[0] for e in mixed[start : start + 3]} == {"x", "y", "z"}
    assert len({e.id for e in mixed}) == 60
    assert len({tuple(e.id[0] for e in mixed[i : i + 3]) for i in range(0, 60, 3)}) > 1
    assert [e.id for e in mixed if e.id[0] == "y"] == [f"y/{i}" for i in range(20)]


def test_weights_are_kept_at_every_point() -> None:
    def make(n: int) -> list[Example]:
        return [Example(str(i), "c", "q", ("a",)) for i in range(n)]

    mixed = mix({"x": make(30), "y": make(20)}, weights={"x": 3}, seed=0)
    assert len(mixed) == 40  # x has ten rounds
    for start in range(0, 40, 4):
        assert sorted(e.id[0] for e in mixed[start : start + 4]) == ["x", "x", "x", "y"]
    assert len({e.id for e in mixed}) == 40
    assert mix({"x": make(9), "y": make(9)}, weights={"x": 1, "y": 1}, seed=3) == mix(
        {"x": make(9), "y": make(9)}, seed=3
    )


def test_a_mixture_with_weights(tmp_path: Path) -> None:
    file = squad_file(tmp_path / "dev.json", contexts=20)
    other = squad_file(tmp_path / "a@b.json", contexts=20)
    spec = f"{file}[:1]@3,{other}"
    mixed = load_examples(spec, split="all", count=8, seed=2)
    assert Counter(e.set_name for e in mixed) == {"dev[:1]": 6, "a@b": 2}
    assert mixed == load_examples(spec, split="all", count=40, seed=2)[:8]
    assert map_paths(spec, lambda path: f"/x{path}") == f"/x{file}[:1]@3,/x{other}"
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    assert with_questions(f"{file}@2,text={text}@5") == f"{file}@2"
    whole = load_examples(f"{file}@3", split="all", count=None, seed=0)
    assert whole == load_examples(str(file), split="all", count=None, seed=0)
    for weight in ("0", "1.5", "."):
        with pytest.raises(DataError, match=r"a weight is a whole number, 1 or more"):
            load_examples(f"{file}@{weight},{other}", split="all", count=None, seed=0)
    with pytest.raises(DataError, match="fewer examples than its weight"):
        load_examples(f"{file}@999,{other}", split="all", count=None, seed=0)


def test_mixture_of_sources(tmp_path: Path) -> None:
    file = squad_file(tmp_path / "dev.json", contexts=20)
    folder = saved_squad(tmp_path / "rows", 40)
    spec = f"{file}, squad={folder},testbed"
    mixed = load_examples(spec, split="train", count=10, seed=2)
    assert Counter(e.id.split("/")[0] for e in mixed).most_common() in (
        [("dev", 4), ("rows", 3), ("testbed", 3)],
        [("rows", 4), ("dev", 3), ("testbed", 3)],
        [("testbed", 4), ("dev", 3), ("rows", 3)],
    )
    assert mixed == load_examples(spec, split="train", count=10, seed=2)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_real_squad_file(split: Split) -> None:
    """The public development set, where a copy is at hand."""
    path = real_file("squad_v1.1_dev_32_articles.json")
    examples = load_examples(str(path), split=split, count=None, seed=0)
    assert len(examples) == {"train": 5796, "heldout": 588}[split]
    assert all(any(a in e.context for a in e.answers) for e in examples)
    assert sources.in_split(examples[0], split)
