"""Sources for training and evaluation: articles, unions, plain texts, packed files, what is kept
apart."""

from __future__ import annotations

import gzip
import json
import logging
import lzma
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from latentwire_fast.config.schema import DataConfig, RunConfig
from latentwire_fast.config.serialization import run_config_from_json, to_json
from latentwire_fast.data.examples import Example
from latentwire_fast.data.source_names import map_paths
from latentwire_fast.data.sources import ASIDE_EVERY, check_apart, heldout_examples, load_examples
from latentwire_fast.data.streams import ExampleStream, TestbedStream, TrainItem
from latentwire_fast.errors import ConfigError, DataError
from latentwire_fast.files.text import read_text
from latentwire_fast.readers.context_limit import ContextLimit
from latentwire_fast.readers.reader import Reader
from latentwire_fast.registry import DATA_SETS
from latentwire_fast.training import trainer as trainer_module
from latentwire_fast.training.builders import build_data
from latentwire_fast.training.session import Session
from latentwire_fast.training.tracking import read_records
from latentwire_fast.training.trainer import Trainer
from runs import tiny_config, weighted_stage

TITLES = ("Rhine", "Amazon", "Oxygen", "Kenya")


def articles(path: Path, *titles: str, paragraphs: int = 3) -> Path:
    """A SQuAD file; a context names its article and paragraph."""
    data = [
        {
            "title": title,
            "paragraphs": [
                {
                    "context": f"{title} has part {p} of all.",
                    "qas": [
                        {
                            "id": f"{title}-{p}",
                            "question": "What?",
                            "answers": [{"text": f"part {p}", "answer_start": 0}],
                        }
                    ],
                }
                for p in range(paragraphs)
            ],
        }
        for title in titles
    ]
    text = json.dumps({"version": "1.1", "data": data}).encode()
    pack = {".xz": lzma.compress, ".gz": gzip.compress}.get(path.suffix, bytes)
    path.write_bytes(pack(text))
    return path


def found_titles(spec: str, **options: object) -> Counter[str]:
    examples = load_examples(spec, split="all", count=None, seed=0, **options)  # type: ignore[arg-type]
    return Counter(example.context.split()[0] for example in examples)


# --- articles of a file ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["squad.json", "squad.json.xz", "squad.json.gz"])
@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("", {*TITLES}),
        ("[:1]", {"Amazon"}),
        ("[1:3]", {"Kenya", "Oxygen"}),
        ("[-2:]", {"Oxygen", "Rhine"}),
        ("[:]", {*TITLES}),
    ],
)
def test_articles_in_the_order_of_their_titles(
    name: str, part: str, expected: set[str], tmp_path: Path
) -> None:
    path = articles(tmp_path / name, *TITLES)
    assert found_titles(f"{path}{part}").keys() == expected
    assert found_titles(f"squad_file={path}{part}").keys() == expected


def test_an_empty_range_says_how_many_there_are(tmp_path: Path) -> None:
    path = articles(tmp_path / "squad.json", *TITLES)
    with pytest.raises(DataError, match=r"squad.json\[9:\]: no article; the file has 4"):
        found_titles(f"{path}[9:]")


def test_an_article_without_a_title_is_found(tmp_path: Path) -> None:
    path = articles(tmp_path / "squad.json", *TITLES)
    data = json.loads(path.read_text())
    del data["data"][2]["title"]
    path.write_text(json.dumps(data))
    assert len(found_titles(str(path))) == 4
    with pytest.raises(DataError, match="article 2: no 'title'"):
        found_titles(f"{path}[:2]")


def test_only_squad_files_have_articles(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text("[]")
    with pytest.raises(DataError, match=r"only a SQuAD file has articles"):
        load_examples(f"hotpot_qa={path}[:2]", split="all", count=None, seed=0)


def test_a_file_that_is_named_like_a_range_is_a_file(tmp_path: Path) -> None:
    path = articles(tmp_path / "squad[1:2]", *TITLES)
    assert len(found_titles(str(path))) == 4


@pytest.mark.parametrize("content", [b"no archive", lzma.compress(b"{}" * 5000)[:-20], b""])
def test_a_damaged_archive_says_so(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "squad.json.xz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"squad.json.xz: (cannot be unpacked|not valid JSON)"):
        found_titles(str(path))


# --- several sources ------------------------------------------------------------------------------


def test_a_union_has_all_of_its_sources(tmp_path: Path) -> None:
    one = articles(tmp_path / "one.json", *TITLES)
    two = articles(tmp_path / "two.json", "Rhine 2", "Geology", paragraphs=9)
    spec = f"{one}[:2]+{one}[3:]+{two}"
    assert found_titles(spec) == {"Amazon": 3, "Kenya": 3, "Rhine": 12, "Geology": 9}
    some = load_examples(spec, split="all", count=5, seed=3)
    assert some == load_examples(spec, split="all", count=None, seed=3)[:5]
    assert some[0].id.partition("/")[0] in {"one[:2]", "one[3:]", "two"}


def test_a_path_with_a_plus_sign_is_a_path(tmp_path: Path) -> None:
    path = articles(tmp_path / "a+b.json", *TITLES)
    assert len(found_titles(f"{path}[:3]")) == 3
    assert map_paths(f"{path}[:3]", str.upper) == f"{str(path).upper()}[:3]"


def test_paths_become_absolute_in_all_pieces() -> None:
    spec = "a.json[:24]+text=b.txt,hub:squad,testbed"
    expected = "/x/a.json[:24]+text=/x/b.txt,hub:squad,testbed"
    assert map_paths(spec, lambda path: f"/x/{path}") == expected


def test_a_union_in_a_folder_with_a_plus_sign_is_refused() -> None:
    """It could not be read again: the plus signs would look alike."""
    with pytest.raises(DataError, match="a plus sign separates sources; rename the folder"):
        map_paths("a.json+b.json", lambda path: f"/x+y/{path}")
    assert map_paths("a.json", lambda path: f"/x+y/{path}") == "/x+y/a.json"


def test_the_same_source_twice_is_refused(tmp_path: Path) -> None:
    path = articles(tmp_path / "squad.json", *TITLES)
    with pytest.raises(DataError, match="two sources of one name"):
        found_titles(f"{path}+{path}")


# --- what is evaluated on -------------------------------------------------------------------------


def test_an_evaluation_source_is_taken_whole(tmp_path: Path) -> None:
    path = articles(tmp_path / "squad.json", *TITLES, paragraphs=60)
    data = DataConfig(f"{path}[:3]", eval_source=f"{path}[3:]", eval_examples=500)
    heldout = heldout_examples(data)
    assert Counter(e.context.split()[0] for e in heldout) == {"Rhine": 60}
    training = load_examples(data.source, split="train", count=None, seed=0, data=data)
    aside = load_examples(data.source, split="heldout", count=None, seed=0, data=data)
    assert len(training) + len(aside) == 180
    assert len(aside) < 2.5 * 180 / ASIDE_EVERY


def test_contexts_in_both_are_refused() -> None:
    def example(context: str) -> Example:
        return Example(context, context, "What?", ("a",))

    training = [example("The  River\nRhine"), example("Oxygen")]
    for context in ("The River Rhine", " the river rhine "):
        with pytest.raises(DataError, match=r"1 of 2 contexts of the evaluation \(B\) are in .*A"):
            check_apart(training, [example(context), example("Kenya")], source="A", eval_source="B")
    check_apart(training, [example("Kenya")], source="A", eval_source="B")


def stream_of(config: RunConfig, readers: dict[str, Reader], data: DataConfig) -> ExampleStream:
    stream = build_data(replace(config, data=data), readers).stream
    assert isinstance(stream, ExampleStream)
    return stream


def test_a_run_refuses_to_be_scored_on_its_training(
    llama_folder: Path, readers: dict[str, Reader], tmp_path: Path
) -> None:
    path = articles(tmp_path / "squad.json", *TITLES)
    other = articles(tmp_path / "other.json", "Rhine")
    config = tiny_config(llama_folder)
    for spec in (f"{path}[2:]", str(other), f"{path}[3:]+{path}[:1]"):
        with pytest.raises(DataError, match="contexts of the evaluation"):
            stream_of(config, readers, DataConfig(f"{path}[:3]+{path}[3:]", eval_source=spec))
    data = DataConfig(f"{path}[:3]", eval_source=f"{path}[3:]", eval_examples=1)
    assert len(stream_of(config, readers, data).items) == 9


def test_long_contexts_are_left_out_and_counted(
    llama_folder: Path,
    readers: dict[str, Reader],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    long = Example("long", "word " * 40, "What?", ("word",))
    short = Example("short", "a word", "What?", ("word",))
    limit = ContextLimit(readers, 30)
    assert [limit.fits(e) for e in (long, short, replace(long, id="again"))] == [False, True, False]
    with caplog.at_level(logging.WARNING):
        limit.report("squad.json")
    assert "squad.json: 1 of 2 contexts have more than 30 tokens" in caplog.text
    assert ContextLimit(readers, None).fits(long)
    longest = max(
        len(reader.prompts.text_ids("Context: Amazon has part 1 of all."))
        for reader in readers.values()
    )
    path = articles(tmp_path / "squad.json", *TITLES)
    for tokens, passages in ((longest, 12), (longest + 99, 12)):
        data = DataConfig(str(path), eval_source=str(path), max_context_tokens=tokens)
        assert len(heldout_examples(data, keep=ContextLimit(readers, tokens).fits)) <= passages
    with pytest.raises(DataError, match="no usable example"):
        stream_of(tiny_config(llama_folder), readers, replace(data, max_context_tokens=1))


def test_training_on_some_of_the_contexts(
    llama_folder: Path, readers: dict[str, Reader], tmp_path: Path
) -> None:
    """All questions on as many contexts as asked for, the same for the same seed."""
    path = articles(tmp_path / "squad.json", *TITLES)
    config = tiny_config(llama_folder)

    def contexts(count: int | None, *, seed: int = 0) -> set[str]:
        data = DataConfig(f"{path}[:3]", eval_source=f"{path}[3:]", train_contexts=count)
        stream = stream_of(replace(config, seed=seed), readers, data)
        assert isinstance(stream, ExampleStream)
        return {item.context for item in stream.items}

    everything = contexts(None)
    assert len(contexts(4)) == 4
    assert contexts(4) == contexts(4) < everything
    assert contexts(4) != contexts(4, seed=1)
    assert contexts(99) == everything


# --- plain texts ----------------------------------------------------------------------------------

LONG_LINE = " ".join(f"Sentence {i} has five words." for i in range(60))


def paragraphs(path: Path, **settings: int) -> list[str]:
    part = DATA_SETS["text"]
    loaded = part(part.Config(**settings)).load(path, split="all", count=None, seed=0)
    found = {example.id: example for example in loaded.examples}
    assert all((e.question, e.answers) == ("", ()) for e in found.values())
    return [found[f"paragraph-{number}"].context for number in range(len(found))]


def test_paragraphs_are_lines(tmp_path: Path) -> None:
    """Headings are too short; a long line is cut behind sentences; a repeated one is there once."""
    path = tmp_path / "text.txt.xz"
    path.write_bytes(lzma.compress(f"= Head =\n\n{LONG_LINE}\n{LONG_LINE}\n".encode()))
    found = paragraphs(path, shortest=10, longest=52)
    assert " ".join(found) == LONG_LINE
    assert [len(text.split()) for text in found] == [50] * 6
    assert all(text.endswith(".") for text in found)


def test_paragraphs_of_short_lines_are_between_empty_ones(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("one two\nthree four\n\n  \nfive six\nseven eight")
    assert paragraphs(path, shortest=4, longest=9) == ["one two three four", "five six seven eight"]


def test_a_sentence_without_end_is_cut_between_words(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"word{i}" for i in range(25)))
    assert [len(text.split()) for text in paragraphs(path, shortest=1, longest=10)] == [10, 10, 5]


def test_a_text_without_paragraphs_says_so(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("too short")
    with pytest.raises(DataError, match="no paragraph of 40 words"):
        paragraphs(path)
    with pytest.raises(ConfigError, match="shortest=9, longest=3"):
        DATA_SETS["text"].Config(shortest=9, longest=3)
    path.write_text(" \n")
    with pytest.raises(DataError, match="holds no text"):
        read_text(path)


def mixed_data(tmp_path: Path, **settings: object) -> DataConfig:
    text = tmp_path / "prose.txt"
    lines = (f"Line {i}: " + "word " * 60 for i in range(40))
    text.write_text("\n".join(lines))
    squad = articles(tmp_path / "squad.json", *TITLES, paragraphs=20)
    return DataConfig(f"{squad}+text={text}", **settings)  # type: ignore[arg-type]


def test_only_questions_are_scored(tmp_path: Path) -> None:
    """Texts of a mixture without an `eval_source` are left out of what is held out."""
    data = mixed_data(tmp_path)
    heldout = heldout_examples(data)
    assert heldout
    assert all(example.answers for example in heldout)
    both = replace(data, source=data.source.replace("+", ","))
    assert {e.context for e in heldout_examples(both)} == {e.context for e in heldout}
    texts = data.source.split("+")[1]
    with pytest.raises(DataError, match="has no questions to be scored on; give a source with"):
        heldout_examples(replace(data, source=texts))


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_texts_have_batches_of_their_own(
    share: float, llama_folder: Path, readers: dict[str, Reader], tmp_path: Path
) -> None:
    data = mixed_data(tmp_path, text_share=share)
    stream = stream_of(tiny_config(llama_folder), readers, data)
    batches = [stream.batch(step, 4, facts=0, texts=True) for step in range(200)]
    kinds = [{bool(item.turns) for item in batch} for batch in batches]
    assert all(len(kind) == 1 for kind in kinds)
    assert sum(kind == {False} for kind in kinds) == int(200 * share)
    for wanted, items in ((False, stream.texts), (True, stream.items)):
        seen = Counter(i.id for b in batches for i in b if bool(i.turns) == wanted)
        epochs = sum(seen.values()) / len(items)  # every item once in each epoch
        assert {int(epochs), -int(-epochs // 1)} >= set(seen.values())
    assert all(item.turns for item in stream.batch(7, 40, facts=0))  # a stage of answers alone
    assert stream.batch(9, 4, facts=0, texts=True) == batches[9]


def test_a_text_trains_what_needs_no_question(llama_folder: Path, tmp_path: Path) -> None:
    """Both kinds of data in one run, in a stage of both kinds of objectives."""
    config = tiny_config(
        llama_folder,
        data=mixed_data(tmp_path, text_share=0.5),
        stages=(
            weighted_stage("both", 4, autoencode=1.0, continuation=1.0, answer=1.0),
            weighted_stage("answers", 2, answer=1.0),
        ),
    )
    trainer = Trainer(config, tmp_path / "run", progress=False)
    trainer.run()
    losses = [set(r["losses"]) for r in read_records(trainer.folder.diagnostics)]
    name = llama_folder.name
    texts = {f"autoencode/{name}", f"continuation/{name}"}
    assert losses == [texts | {f"answer/{name}"}, texts] * 2 + [{f"answer/{name}"}] * 2


def test_data_without_questions_trains_no_answers(
    llama_folder: Path, readers: dict[str, Reader], tmp_path: Path
) -> None:
    text = tmp_path / "prose.txt"
    text.write_text("\n".join(f"Line {i}: " + "word " * 60 for i in range(40)))
    config = tiny_config(llama_folder)
    with pytest.raises(DataError, match="has no questions, and stage 'answer' learns from nothing"):
        stream_of(config, readers, DataConfig(f"text={text}"))
    stream = stream_of(
        replace(config, stages=config.stages[:1]), readers, DataConfig(f"text={text}")
    )
    assert not stream.items
    assert stream.text_share == 1
    with pytest.raises(DataError, match="no training examples with an answer"):
        ExampleStream([Example("t", "a text", "", ())], DataConfig(), mode="pure", seed=0)


def test_data_settings_are_checked_and_stored(llama_folder: Path) -> None:
    for wrong in ({"text_share": 1.5}, {"max_context_tokens": 0}, {"train_contexts": 0}):
        with pytest.raises(ConfigError):
            DataConfig(**wrong)  # type: ignore[arg-type]
    data = DataConfig("a.json[:2]", eval_source="a.json[2:]", text_share=0.5, max_context_tokens=9)
    config = tiny_config(llama_folder, data=data)
    assert run_config_from_json(json.loads(json.dumps(to_json(config)))) == config


def test_a_stage_may_have_batches_of_its_own_size(llama_folder: Path, tmp_path: Path) -> None:
    stages = (
        replace(weighted_stage("one", 1, answer=1.0), batch_size=2),
        weighted_stage("two", 1, answer=1.0),
    )
    config = tiny_config(llama_folder, stages=stages)
    sizes = []
    trainer = Trainer(config, tmp_path / "run", progress=False)

    def seen(step: int, size: int, **options: Any) -> list[TrainItem]:
        sizes.append(size)
        return TestbedStream.batch(trainer.session.stream, step, size, **options)  # type: ignore[arg-type]

    open_session = trainer_module.open_session

    def opened(*args: Any, **options: Any) -> Session:
        session = open_session(*args, **options)
        session.stream.batch = seen  # type: ignore[method-assign]
        return session

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "open_session", opened)
        trainer.run()
    assert sizes == [2, config.optim.batch_size]
    with pytest.raises(ConfigError, match="batch_size=0, expected at least 1"):
        replace(stages[0], batch_size=0)
