"""Batches depend on (seed, step) alone; epochs are permutations; questions share contexts."""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import replace

import pytest

from latentwire_fast.config.schema import DataConfig, Mode
from latentwire_fast.data.examples import Example
from latentwire_fast.data.streams import ExampleStream, Stream, TestbedStream, TrainItem
from latentwire_fast.data.testbed import RELATIONS, SYLLABLES, is_heldout
from latentwire_fast.errors import DataError
from latentwire_fast.prompts.builder import Turn

PER_CONTEXT = 3
NAMES = {(first + second).capitalize() for first in SYLLABLES for second in SYLLABLES}


def config(questions: int = PER_CONTEXT) -> DataConfig:
    return DataConfig(questions_per_context=questions)


def data_set(contexts: int = 7, questions: int = 5) -> list[Example]:
    """Examples in SQuAD's order: those of one context after another."""
    return [
        Example(f"{c}-{q}", f"context {c}", f"question {c}-{q}?", (f"answer {c}-{q}", "other"))
        for c in range(contexts)
        for q in range(questions)
    ]


def make_stream(kind: str, *, mode: Mode = "context", seed: int = 0) -> Stream:
    if kind == "testbed":
        return TestbedStream(config(), mode=mode, seed=seed)
    return ExampleStream(data_set(), config(), mode=mode, seed=seed)


def test_counted_batches_of_texts_come_in_the_place_of_their_share() -> None:
    texts = [Example(f"t{i}", f"text {i}", "", ()) for i in range(6)]
    stream = ExampleStream([*data_set(), *texts], config(), mode="context", seed=0)
    counted = [(0, 0), (0, 1), (1, 2), (2, 2)]
    found = [stream.batch(s, 2, facts=4, texts=True, counted=c) for s, c in enumerate(counted)]
    assert [bool(batch[0].turns) for batch in found] == [True, False, False, True]
    seen = [item.id for batch in found for item in batch]
    assert len(set(seen)) == len(seen)
    assert stream.batch(2, 2, facts=4, counted=(0, 1))[0].turns  # a stage that takes no texts


@pytest.mark.parametrize("mode", ["context", "pure"])
@pytest.mark.parametrize("kind", ["testbed", "examples"])
def test_a_batch_is_a_function_of_seed_and_step(kind: str, mode: Mode) -> None:
    stream = make_stream(kind, mode=mode)
    in_order = [stream.batch(step, 6, facts=4) for step in range(5)]
    random.seed(77)
    later = make_stream(kind, mode=mode)  # as after a resume: some steps, in any order
    for step in (4, 0, 2):
        assert later.batch(step, 6, facts=4) == in_order[step]
    assert make_stream(kind, mode=mode, seed=1).batch(0, 6, facts=4) != in_order[0]
    assert all(len(batch) == 6 for batch in in_order)


@pytest.mark.parametrize("mode", ["context", "pure"])
@pytest.mark.parametrize("kind", ["testbed", "examples"])
def test_pure_items_hold_one_question_and_all_items_are_answered(kind: str, mode: Mode) -> None:
    items = make_stream(kind, mode=mode).batch(0, 40, facts=4)
    counts = {len(item.turns) for item in items}
    assert counts == {1} if mode == "pure" else max(counts) == PER_CONTEXT
    assert all(turn.answer for item in items for turn in item.turns)


# --- testbed ------------------------------------------------------------------------------------


def test_testbed_passages_are_fresh_and_of_training_names() -> None:
    stream = make_stream("testbed")
    items = [item for step in range(20) for item in stream.batch(step, 10, facts=4)]
    assert len({item.id for item in items}) == 200
    assert len({item.context for item in items if item.context.count(".") == 4}) > 100
    names = NAMES & {w for item in items for w in re.findall(r"[A-Z][a-z]+", item.context)}
    assert len(names) > 300
    assert not any(map(is_heldout, names))


@pytest.mark.parametrize("facts", [1, 2, 4, 6])
def test_a_fifth_of_the_passages_may_be_easier_and_none_is_harder(facts: int) -> None:
    items = make_stream("testbed").batch(0, 400, facts=facts)
    levels = Counter(item.context.count(".") for item in items)
    assert set(levels) == {n for n in (1, 2, 4, 6) if n <= facts}
    assert levels[facts] > 0.75 * len(items)


def test_similar_passages_are_mixed_in_as_asked() -> None:
    """Similar ones hold two of the six kinds of facts."""
    patterns = {
        name: "|".join(t.format(name=".*", value=".*") for t in relation.statements)
        for name, relation in RELATIONS.items()
    }

    def kinds(item: TrainItem) -> int:
        facts = [f"{fact}." for fact in item.context.removesuffix(".").split(". ")]
        return len({n for n, p in patterns.items() for fact in facts if re.fullmatch(p, fact)})

    shares = {}
    for share in (0.0, 1.0):
        stream = TestbedStream(replace(config(), similar=share), mode="context", seed=0)
        items = [item for item in stream.batch(0, 200, facts=4) if item.context.count(".") == 4]
        shares[share] = sum(kinds(item) <= 2 for item in items) / len(items)
    assert shares[1.0] == 1.0
    assert shares[0.0] < 0.5


def test_testbed_answers_are_in_their_contexts() -> None:
    for mode in ("context", "pure"):
        for item in make_stream("testbed", mode=mode).batch(3, 50, facts=4):
            assert all(turn.answer in item.context for turn in item.turns)
            assert len({turn.question for turn in item.turns}) == len(item.turns)


def test_pure_batches_ask_different_questions_of_one_passage() -> None:
    """The encoder has to tell them apart."""
    items = make_stream("testbed", mode="pure").batch(0, 48, facts=4)
    asked: dict[str, set[str]] = {}
    for item in items:
        asked.setdefault(item.context, set()).add(item.turns[0].question)
    assert max(map(len, asked.values())) == PER_CONTEXT
    assert sum(map(len, asked.values())) == len(items)


# --- data sets ----------------------------------------------------------------------------------


def test_every_epoch_is_another_permutation() -> None:
    stream = ExampleStream(data_set(), config(), mode="pure", seed=0)
    count = len(stream.items)
    assert count == 35
    size = 4  # does not divide the epoch: batches run across its end
    drawn = [item for step in range(3 * count) for item in stream.batch(step, size, facts=4)]
    epochs = [drawn[i : i + count] for i in range(0, len(drawn), count)]
    assert len(epochs) == 12
    for epoch in epochs:
        assert sorted(item.id for item in epoch) == sorted(item.id for item in stream.items)
    assert len({tuple(item.id for item in epoch) for epoch in epochs}) == 12


def test_the_batch_size_does_not_change_the_order() -> None:
    stream = make_stream("examples", mode="pure")
    small = [item for step in range(8) for item in stream.batch(step, 3, facts=4)]
    large = [item for step in range(2) for item in stream.batch(step, 12, facts=4)]
    assert small == large


def test_context_items_group_the_questions_of_one_context() -> None:
    stream = ExampleStream(data_set(), config(), mode="context", seed=0)
    assert len(stream.items) == 14  # 3 + 2 questions of each of 7 contexts
    asked = []
    for item in stream.items:
        assert len(item.turns) in (2, 3)
        for turn in item.turns:
            number = turn.question.removeprefix("question ").removesuffix("?")
            assert item.context == f"context {number.split('-')[0]}"
            assert turn.answer == f"answer {number}"  # the first of the accepted ones
            asked.append(number)
    assert sorted(asked) == sorted(e.id for e in data_set())


def test_questions_are_grouped_wherever_they_stand() -> None:
    mixed = random.Random(0).sample(data_set(), 35)
    stream = ExampleStream(mixed, config(questions=10), mode="context", seed=0)
    assert sorted(len(item.turns) for item in stream.items) == [5] * 7


def test_examples_without_an_answer_are_not_trained_on() -> None:
    examples = [replace(e, answers=()) if e.id.endswith("-1") else e for e in data_set(2, 3)]
    stream = ExampleStream(examples, config(), mode="context", seed=0)
    assert [len(item.turns) for item in stream.items] == [2, 2]
    pure = ExampleStream(examples, config(), mode="pure", seed=0)
    assert {item.id for item in pure.items} == {"0-0", "0-2", "1-0", "1-2"}
    assert pure.items[0] == TrainItem("0-0", "context 0", (Turn("question 0-0?", "answer 0-0"),))


def test_no_examples_are_an_error() -> None:
    with pytest.raises(DataError, match="no training examples"):
        ExampleStream([], config(), mode="pure", seed=0)


def test_only_unanswerable_examples_are_an_error() -> None:
    examples = [replace(e, answers=()) for e in data_set(1, 2)]
    with pytest.raises(DataError, match="no training examples"):
        ExampleStream(examples, config(), mode="pure", seed=0)


def test_the_digest_is_of_everything_that_is_trained_on() -> None:
    def digest(examples: list[Example], mode: Mode = "context") -> str:
        return ExampleStream(examples, config(), mode=mode, seed=0).digest

    examples = data_set()
    assert digest(examples) == digest(data_set())
    assert digest(examples) != digest(examples, "pure"), "other items"
    for change in ({"context": "c"}, {"question": "q?"}, {"answers": ("a",)}, {"id": "i"}):
        assert digest([replace(examples[0], **change), *examples[1:]]) != digest(examples)
    assert digest(examples[1:]) != digest(examples)
    assert TestbedStream(config(), mode="context", seed=0).digest == ""
