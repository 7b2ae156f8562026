"""The built-in task and its readers: what the passages promise, and that readers can be rebuilt."""

from __future__ import annotations

import itertools
import json
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from latentwire_fast.data.testbed import (
    COLOURS,
    JOBS,
    NAME_RELATIONS,
    OBJECTS,
    RELATIONS,
    SYLLABLES,
    Passage,
    is_heldout,
    make_examples,
    make_passage,
    random_name,
)
from latentwire_fast.errors import CheckpointError, ConfigError
from latentwire_fast.files.tensors import parameter_digest
from latentwire_fast.prompts.builder import ANCHOR, PromptBuilder, Turn
from latentwire_fast.readers.loading import resolve_source
from latentwire_fast.readers.reader import Reader
from latentwire_fast.serving import Receiver
from latentwire_fast.testbed import build
from latentwire_fast.testbed.recipes import RECIPES, Recipe
from latentwire_fast.testbed.rows import DRILLS, RowMaker, collate, drill_rows
from latentwire_fast.testbed.training import ReaderTraining, new_model

NAMES = [(first + second).capitalize() for first in SYLLABLES for second in SYLLABLES]
NAME = "[A-Z][a-z]{5}"


def names_in(text: str) -> list[str]:
    """The invented names in a text."""
    return [word for word in re.findall(NAME, text) if word in NAMES]


def passages(count: int, *, facts: int = 4, split: str = "train", seed: int = 0) -> list[Passage]:
    rng = random.Random(seed)
    return [make_passage(rng, facts=facts, split=split) for _ in range(count)]


def template(form: str, *, value: str = "(?P<value>.+)") -> re.Pattern[str]:
    """A surface form as a pattern with the groups `name` and `value`."""
    pattern = re.escape(form).replace(r"\{name\}", f"(?P<name>{NAME})")
    return re.compile(pattern.replace(r"\{value\}", value))


def stated_facts(context: str) -> dict[tuple[str, str], str]:
    """(person, relation) -> value, read back from the sentences of a context."""
    facts: dict[tuple[str, str], str] = {}
    for sentence in re.findall(r"[^.]+\.", context):
        readings = [
            (match["name"], relation, match["value"])
            for relation, forms in RELATIONS.items()
            for form in forms.statements
            if (match := template(form).fullmatch(sentence.strip()))
        ]
        assert len(readings) == 1, sentence
        name, relation, value = readings[0]
        assert (name, relation) not in facts
        facts[name, relation] = value
    return facts


def asked(question: str) -> tuple[str, str]:
    """(person, relation) that a question is about."""
    readings = [
        (match["name"], relation)
        for relation, forms in RELATIONS.items()
        for form in forms.questions
        if (match := template(form).fullmatch(question))
    ]
    assert len(readings) == 1, question
    return readings[0]


# --- the task -----------------------------------------------------------------------------------


def test_the_building_blocks_are_as_promised() -> None:
    assert len(SYLLABLES) == len(set(SYLLABLES)) == 64
    assert all(re.fullmatch("[^aeiou][aeiou][^aeiou]", s) for s in SYLLABLES)
    assert len(JOBS) == 28
    words = [*JOBS, *COLOURS, *OBJECTS]
    assert len(set(words)) == len(words)
    assert all(re.fullmatch("[a-z]+", word) for word in words)
    assert set(RELATIONS) == {"place", "dog", "boss", "job", "age", "thing"}
    assert set(NAME_RELATIONS) == {"place", "dog", "boss"}
    for relation in RELATIONS.values():
        assert 2 <= len(relation.statements) <= 3
        assert len(relation.questions) == 2


def test_a_tenth_of_the_names_is_held_out() -> None:
    share = sum(map(is_heldout, NAMES)) / len(NAMES)
    assert 0.08 < share < 0.12


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_the_splits_share_no_name(split: str) -> None:
    for passage in passages(500, split=split):
        text = " ".join([passage.context, *(part for pair in passage.questions for part in pair)])
        found = names_in(text)
        assert len(found) >= 7  # three people, and the one each question is about
        assert all(is_heldout(name) == (split == "heldout") for name in found)


@pytest.mark.parametrize("facts", [1, 2, 3, 4, 6, 18])
def test_every_question_has_one_answer_and_it_is_in_the_context(facts: int) -> None:
    for passage in passages(60, facts=facts, split="heldout"):
        stated = stated_facts(passage.context)
        assert len(stated) == len(passage.questions) == facts
        assert {asked(question): answer for question, answer in passage.questions} == stated


def test_values_are_of_their_relations_kind() -> None:
    seen = Counter()
    for passage in passages(400):
        for (_, relation), value in stated_facts(passage.context).items():
            seen[relation] += 1
            if relation in NAME_RELATIONS:
                assert value in NAMES
            elif relation == "job":
                assert value in JOBS
            elif relation == "age":
                assert 10 <= int(value) <= 99
            else:
                colour, thing = value.split()
                assert colour in COLOURS
                assert thing in OBJECTS
    assert min(seen.values()) > 150  # each about a sixth of 1600


def test_a_passage_is_about_few_people_whose_names_start_differently() -> None:
    for facts, people in ((1, 1), (2, 2), (3, 3), (4, 3), (6, 4)):
        for passage in passages(50, facts=facts):
            stated = stated_facts(passage.context)
            persons = {person for person, _ in stated}
            assert len(persons) == people
            names = persons | {v for (_, r), v in stated.items() if r in NAME_RELATIONS}
            starts = [name[:3] for name in names]
            assert len(starts) == len(set(starts))


def test_facts_and_questions_are_shuffled() -> None:
    drawn = passages(200)
    orders = Counter(
        tuple(p.context.index(asked(question)[0]) for question, _ in p.questions) for p in drawn
    )
    sorted_ones = sum(n for order, n in orders.items() if list(order) == sorted(order))
    assert sorted_ones < len(drawn) / 4
    relations = Counter(asked(p.questions[0][0])[1] for p in drawn)
    assert len(relations) == len(RELATIONS)


def test_texts_have_the_promised_size() -> None:
    sizes = [len(p.context.encode()) for p in passages(300, split="heldout")]
    assert min(sizes) > 130
    assert max(sizes) < 263
    assert 150 < sum(sizes) / len(sizes) < 220


@pytest.mark.parametrize("facts", [0, 19])
def test_an_impossible_number_of_facts_is_refused(facts: int) -> None:
    with pytest.raises(ValueError, match=f"facts={facts}, expected 1 to 18"):
        make_passage(random.Random(0), facts=facts)


@pytest.mark.parametrize("facts", [2, 4, 6])
def test_passages_of_few_relations_have_facts_to_tell_apart(facts: int) -> None:
    rng = random.Random(0)
    for _ in range(50):
        passage = make_passage(rng, facts=facts, relations=2)
        questions = {question for question, _ in passage.questions}
        kinds = [
            name
            for name, relation in RELATIONS.items()
            for template in relation.questions
            if any(re.fullmatch(template.replace("{name}", ".*"), q) for q in questions)
        ]
        assert len(set(kinds)) <= 2
        assert len(questions) == facts
    with pytest.raises(ValueError, match="facts=7, expected 1 to 6"):
        make_passage(rng, facts=7, relations=2)


def test_examples_follow_their_seed_alone() -> None:
    first = make_examples(20, seed=4)
    random.seed(99)
    assert make_examples(20, seed=4) == first
    assert make_examples(5, seed=4) == first[:5]
    assert {e.context for e in make_examples(20, seed=5)}.isdisjoint(e.context for e in first)
    assert len({e.id for e in first}) == 20


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_examples_are_the_same_in_every_process(hash_seed: str, repository: Path) -> None:
    command = [sys.executable, "-m", "latentwire_fast.data.testbed", "--count", "4", "--seed", "9"]
    shown = subprocess.run(
        command,
        cwd=repository,
        env={"PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=True,
    )
    expected = [f"{e.context}\n  {e.question} -> {e.answers[0]}" for e in make_examples(4, seed=9)]
    assert shown.stdout.splitlines() == "\n".join(expected).splitlines()


# --- tokenizers ---------------------------------------------------------------------------------


@pytest.fixture(params=["llama", "qwen", "mistral"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return request.getfixturevalue(f"{request.param}_tokenizer")


def test_every_name_is_two_tokens_nearly_always_its_syllables(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    ids = tokenizer([f" {name}" for name in NAMES], add_special_tokens=False)["input_ids"]
    assert {len(row) for row in ids} == {2}
    assert len({tuple(row) for row in ids}) == len(NAMES)
    firsts = [tokenizer.decode(row[:1]).strip() for row in ids]
    # So names with other first syllables have other first tokens: the copied one settles the rest.
    assert all(first.startswith(name[:3]) for first, name in zip(firsts, NAMES, strict=True))
    whole = sum(first == name[:3] for first, name in zip(firsts, NAMES, strict=True))
    assert whole >= 0.99 * len(NAMES)  # a few are cut a letter late: Bing-ar


def test_other_values_are_one_token_a_word_and_ages_two(
    tokenizer: PreTrainedTokenizerFast, mistral_tokenizer: PreTrainedTokenizerFast
) -> None:
    words = [*JOBS, *COLOURS, *OBJECTS]
    for word in words:
        assert len(tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) == 1, word
    ages = {
        age: len(tokenizer(f" {age}", add_special_tokens=False)["input_ids"])
        for age in range(10, 100)
    }
    whole = [79] if tokenizer is mistral_tokenizer else []  # its last merge
    assert ages == {age: 1 if age in whole else 2 for age in ages}


def test_passages_come_back_from_their_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    for passage in passages(50, facts=6):
        ids = tokenizer(passage.context, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == passage.context
        assert tokenizer.unk_token_id is None or tokenizer.unk_token_id not in ids


def test_the_two_tokenizers_have_little_in_common(
    llama_tokenizer: PreTrainedTokenizerFast, qwen_tokenizer: PreTrainedTokenizerFast
) -> None:
    assert len(llama_tokenizer) != len(qwen_tokenizer)
    assert set(llama_tokenizer.all_special_tokens) & set(qwen_tokenizer.all_special_tokens) == {
        "<pad>"
    }
    assert llama_tokenizer.chat_template != qwen_tokenizer.chat_template
    assert qwen_tokenizer.bos_token is None
    text = passages(1)[0].context
    ids = [
        t(text, add_special_tokens=False)["input_ids"] for t in (llama_tokenizer, qwen_tokenizer)
    ]
    assert ids[0] != ids[1]


# --- training rows ------------------------------------------------------------------------------


@pytest.fixture
def rows(tokenizer: PreTrainedTokenizerFast) -> RowMaker:
    return RowMaker(tokenizer, random.Random(0))


def test_shuffled_chunks_can_be_copied_by_content_only(rows: RowMaker) -> None:
    """Every scored token follows a token that it followed before, at varying distances."""
    distances = set()
    for ids, weights in rows.batch(0, 40):
        assert len(ids) == len(weights) <= 64
        assert any(weights)
        pairs = list(itertools.pairwise(ids))
        for i, weight in enumerate(weights):
            if weight:
                earlier = [j for j in range(i - 1) if pairs[j] == pairs[i - 1]]
                assert earlier
                distances.add(i - 1 - earlier[-1])
        assert min(ids) >= rows.special
    assert len(distances) > 5


def test_item_lists_ask_for_items_that_were_listed(
    rows: RowMaker, tokenizer: PreTrainedTokenizerFast
) -> None:
    for ids, weights in rows.batch(1, 16)[: drill_rows(16)]:
        listed, *answers = tokenizer.decode(ids).split(f"\n{ANCHOR}")
        assert len(answers) == 6
        for answer in answers:
            assert answer.removesuffix(tokenizer.eos_token).strip() in listed
        # The first token says which item is meant, so it is not scored; all that follow are.
        ends = [i for i, token in enumerate(ids) if token == tokenizer.eos_token_id]
        assert len(ends) == 6
        assert all(weights[end] == 1 for end in ends)
        assert {0.0, 1.0} == set(weights)


def test_passage_rows_score_answers_full_and_the_rest_a_little(
    rows: RowMaker, tokenizer: PreTrainedTokenizerFast
) -> None:
    batch = rows.batch(4, 24)
    assert len(batch) == 24
    builder = PromptBuilder(tokenizer)
    for ids, weights in batch[DRILLS * drill_rows(24) :]:
        assert set(weights) == {0.1, 1.0}
        scored = [token for token, weight in zip(ids, weights, strict=True) if weight == 1.0]
        text = tokenizer.decode(ids, skip_special_tokens=True)
        answers = tokenizer.decode(scored).split(tokenizer.eos_token)[:-1]
        assert len(answers) in (1, 2, 4)  # all questions of the passage, easier ones mixed in
        assert all(answer in text for answer in answers)
        assert (
            ids[: builder.content_start]
            == builder.build([Turn("Q")], context="C").ids[: builder.content_start]
        )
        assert not any(is_heldout(name) for name in names_in(text))


def test_rows_without_a_question_end_at_once(
    rows: RowMaker, tokenizer: PreTrainedTokenizerFast
) -> None:
    drills = drill_rows(24)
    batch = rows.batch(4, 24, unasked=True)
    assert len(batch) == 24
    for ids, weights in batch[DRILLS * drills : (DRILLS + 1) * drills]:
        assert "Question" not in tokenizer.decode(ids)
        assert [token for token, w in zip(ids, weights, strict=True) if w] == [
            tokenizer.eos_token_id
        ]
        assert ids[-1] == tokenizer.eos_token_id


def test_padding_has_no_weight() -> None:
    ids, weights = collate([([5, 6, 7], [0.1, 1.0, 1.0]), ([8], [1.0])], 0)
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    torch.testing.assert_close(weights, torch.tensor([[0.1, 1.0, 1.0], [1.0, 0.0, 0.0]]))


# --- initial weights ----------------------------------------------------------------------------


def copying(model: PreTrainedModel, ids: Tensor, scored: Tensor) -> float:
    """Share of scored tokens that come first among the tokens other than the current one.

    A fresh tied model expects every token to follow itself; that much training has to undo.
    """
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, :-1]
    logits.scatter_(2, ids[:, :-1, None], -torch.inf)
    return (logits.argmax(-1) == ids[:, 1:])[scored].float().mean().item()


@pytest.mark.parametrize("name", RECIPES)
def test_new_readers_copy_already_and_without_the_circuit_they_do_not(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = request.getfixturevalue(f"{name}_tokenizer")
    chunks = RowMaker(tokenizer, random.Random(3)).batch(0, 12)
    ids, weights = collate(chunks, tokenizer.pad_token_id)
    scored = weights[:, 1:] == 1
    with torch.random.fork_rng(devices=[]):
        fresh = new_model(RECIPES[name], tokenizer).eval()
        monkeypatch.setattr(f"{new_model.__module__}.add_induction_circuit", lambda model: None)
        plain = new_model(RECIPES[name], tokenizer).eval()
    assert copying(fresh, ids, scored) > 0.25  # chance is 1 in 700 to 900
    assert copying(plain, ids, scored) < 0.05


def test_the_circuits_heads_attend_as_designed(llama_tokenizer: PreTrainedTokenizerFast) -> None:
    with torch.random.fork_rng(devices=[]):
        model = new_model(RECIPES["llama"], llama_tokenizer).eval()
    model.set_attn_implementation("eager")
    chunks = RowMaker(llama_tokenizer, random.Random(3)).batch(0, 8)
    ids, weights = collate(chunks, llama_tokenizer.pad_token_id)
    with torch.no_grad():
        attentions = model(input_ids=ids, output_attentions=True).attentions
    previous = attentions[0][:, 0].diagonal(-1, 1, 2)
    assert previous.mean() > 0.6
    after_same = torch.zeros(*ids.shape, ids.shape[1])
    for i in range(ids.shape[1]):
        after_same[:, i, 1 : i + 1] = (ids[:, :i] == ids[:, i : i + 1]).float()
    matched = (attentions[1][:, 0] * after_same).sum(-1)[:, :-1]
    assert matched[weights[:, 1:] == 1].mean() > 0.5


# --- building readers ---------------------------------------------------------------------------


@pytest.fixture
def tiny_recipe() -> Callable[[str], Recipe]:
    def shrink(name: str, *, steps: int = 8) -> Recipe:
        recipe = RECIPES[name].shortened(steps)
        return replace(recipe, hidden_size=32, layers=2, heads=4, batch_size=8)

    return shrink


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_goes_from_copying_to_four_facts_and_ends_at_rest(name: str) -> None:
    recipe = RECIPES[name]
    levels = [recipe.facts_at(step) for step in range(recipe.steps)]
    assert levels == sorted(levels)
    assert set(levels) == {0, 1, 2, 4}
    factors = [recipe.lr_factor(step) for step in range(recipe.steps)]
    assert max(factors) == 1
    assert 0 < factors[0] < 0.1
    assert 0 <= factors[-1] < 0.01
    short = recipe.shortened(recipe.steps // 10)
    assert short.steps == recipe.steps // 10
    assert {short.facts_at(step) for step in range(short.steps)} == {0, 1, 2, 4}


@pytest.mark.parametrize("name", RECIPES)
def test_a_shortened_build_writes_a_reader_that_loads(
    name: str,
    tiny_recipe: Callable[..., Recipe],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokenizer = request.getfixturevalue(f"{name}_tokenizer")
    out = tmp_path / name
    monkeypatch.setitem(RECIPES, name, tiny_recipe(name, steps=100))
    monkeypatch.setitem(build.TOKENIZERS, name, lambda: tokenizer)
    monkeypatch.setattr(build, "quiet_libraries", lambda: None)
    options = ["--steps", "8", "--examples", "6", "--threads", str(torch.get_num_threads())]
    monkeypatch.setattr(sys, "argv", ["build", "--reader", name, "--out", str(out), *options])
    build.main()

    with safe_open(out / "model.safetensors", "pt") as weights:
        assert {weights.get_tensor(key).dtype for key in weights.keys()} == {torch.float16}  # noqa: SIM118
    record = json.loads((out / "build.json").read_text())
    assert json.loads(capsys.readouterr().out) == record
    assert record["examples"] == 6
    assert 0 <= record["text_em"] <= record["text_f1"] <= 1
    assert f"--reader {name}" in (out / "README.md").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == [name]  # no checkpoint is left behind

    reader = Reader.load(out, name=name)
    assert reader.model.config.model_type == RECIPES[name].architecture
    assert reader.d_model == 32
    prompt = reader.prompts.build([Turn("Who?")], context="Nulnak is already 94 years old.")
    assert len(Receiver.for_text(reader).generate([prompt])) == 1


@pytest.mark.parametrize("option", ["--steps", "--examples", "--threads"])
def test_impossible_options_are_refused_before_the_training(
    option: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(build, "ReaderTraining", lambda *_, **__: pytest.fail("trains"))
    command = ["build", "--reader", "llama", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [*command, option, "0"])
    with pytest.raises(SystemExit, match="2"):
        build.main()
    assert "0, expected at least 1" in capsys.readouterr().err
    (tmp_path / "out").write_text("a file")
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(ConfigError, match="out is no folder"):
        build.main()


def test_training_moves_every_weight_and_lowers_the_loss(
    tiny_recipe: Callable[..., Recipe], llama_tokenizer: PreTrainedTokenizerFast
) -> None:
    training = ReaderTraining(tiny_recipe("llama", steps=20), llama_tokenizer)
    before = {name: p.detach().clone() for name, p in training.named}
    rows = RowMaker(llama_tokenizer, random.Random(8)).batch(2, 8)
    ids, weights = collate(rows[DRILLS:], llama_tokenizer.pad_token_id)

    def loss() -> float:
        with torch.no_grad():
            logprobs = training.model(input_ids=ids).logits[:, :-1].log_softmax(-1)
        gold = logprobs.gather(2, ids[:, 1:, None])[..., 0]
        return -(gold[weights[:, 1:] > 0]).mean().item()

    first = loss()
    training.run(progress=False)
    assert loss() < first - 0.1
    assert all(not torch.equal(before[name], p) for name, p in training.named)
    assert not training.model.training


def test_an_interrupted_build_goes_on_as_if_it_had_not_been(
    tiny_recipe: Callable[..., Recipe],
    qwen_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = tiny_recipe("qwen", steps=6)
    whole = ReaderTraining(recipe, qwen_tokenizer)
    whole.run(progress=False)

    monkeypatch.setattr(ReaderTraining, "SAVE_EVERY", 2)
    stopped = ReaderTraining(recipe, qwen_tokenizer, checkpoints=tmp_path)
    step = stopped._train_step

    def step_until_stopped() -> float:
        if stopped.step == 3:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(stopped, "_train_step", step_until_stopped)
    with pytest.raises(KeyboardInterrupt):
        stopped.run(progress=False)
    resumed = ReaderTraining(recipe, qwen_tokenizer, checkpoints=tmp_path)
    assert resumed.step == 2
    resumed.run(progress=False)
    assert parameter_digest(resumed.named) == parameter_digest(whole.named)
    assert resumed.accuracy == whole.accuracy

    other = replace(recipe, muon_lr=0.5)
    with pytest.raises(CheckpointError, match="another recipe"):
        ReaderTraining(other, qwen_tokenizer, checkpoints=tmp_path)


# --- the shipped readers ------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen"])
def test_the_shipped_readers_read_text_and_cannot_do_without_it(name: str) -> None:
    """The positive control: text EM >= 0.95 on 500 held-out prompts, F1 <= 0.10 on 12 tokens."""
    folder = Path(resolve_source(f"testbed:{name}"))
    measured = build.score_reader(folder, examples=500, budget=12)
    assert measured["text_em"] >= 0.95
    assert measured["token_budget_f1"] <= 0.10


def test_the_shipped_readers_are_small_and_in_half_precision() -> None:
    sizes = 0
    for name in ("llama", "qwen"):
        folder = Path(resolve_source(f"testbed:{name}"))
        sizes += sum(path.stat().st_size for path in folder.iterdir())
        with safe_open(folder / "model.safetensors", "pt") as weights:
            assert {weights.get_tensor(key).dtype for key in weights.keys()} == {torch.float16}  # noqa: SIM118
    assert sizes < 10e6


def test_random_names_cover_all_syllables() -> None:
    rng = random.Random(0)
    drawn = [random_name(rng) for _ in range(2000)]
    assert set(drawn) <= set(NAMES)
    assert {name[:3].lower() for name in drawn} == {name[3:] for name in drawn} == set(SYLLABLES)
