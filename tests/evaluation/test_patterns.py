"""Patterns of two readers: likelihoods, what is fitted, and each pattern on tiny readers."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from latentwire_fast.config.schema import (
    DataConfig,
    EvalConfig,
    ReaderConfig,
    RunConfig,
    StageConfig,
)
from latentwire_fast.data.examples import Choices, Example
from latentwire_fast.data.sources import heldout_examples, load_examples
from latentwire_fast.errors import ConfigError, DataError
from latentwire_fast.evaluation.flops import count_flops
from latentwire_fast.evaluation.joint import rescore
from latentwire_fast.evaluation.metrics import f1
from latentwire_fast.evaluation.patterns.base import PatternCase, PatternResult, PatternRow
from latentwire_fast.evaluation.patterns.calibration import (
    TEMPERATURES,
    Combiner,
    best_temperature,
)
from latentwire_fast.evaluation.patterns.console import pattern_lines
from latentwire_fast.evaluation.patterns.given import GivenTexts, check_given
from latentwire_fast.evaluation.patterns.panel import ReaderPanel, gold_at
from latentwire_fast.evaluation.patterns.pipeline import pattern_config
from latentwire_fast.evaluation.patterns.truthful import is_truthful, majority
from latentwire_fast.evaluation.patterns.two_stage import retrieved
from latentwire_fast.evaluation.ranking import mrr, ndcg
from latentwire_fast.prompts.builder import Turn
from latentwire_fast.readers.decoding import DecodeOptions
from latentwire_fast.readers.reader import Reader
from latentwire_fast.registry import PATTERNS
from latentwire_fast.serving import Receiver
from readers import tiny_interlingua
from real_files import real_file

pytestmark = pytest.mark.usefixtures("on_the_cpu")

SUBJECTS = ("astronomy", "law")


@pytest.fixture(scope="module")
def case(readers: dict[str, Reader]) -> PatternCase:
    """An untrained model with both tiny readers, given the text and payloads."""
    model = tiny_interlingua(readers, "context")
    config = RunConfig(
        readers={name: ReaderConfig("testbed:llama") for name in readers},
        encoder=model.encoder_config,
        bottleneck=model.bottleneck_config,
        attachments=model.attachment_configs,
        data=DataConfig(facts=1),
        stages=(StageConfig("answer", steps=1),),
        evaluation=EvalConfig(batch_size=8, max_new_tokens=3, timing_examples=1, resamples=20),
    )
    receivers = {name: Receiver.of(model, reader) for name, reader in readers.items()}
    return PatternCase(config, model, receivers, None, None, ("text", "payload"), progress=False)


def tried(case: PatternCase, name: str, *options: str, **changes: Any) -> PatternResult:
    """A pattern with single settings on the case, some of whose fields are changed."""
    changed = PatternCase(**{**vars(case), **changes})
    result: PatternResult = PATTERNS[name](pattern_config(name, options)).run(changed)
    json.dumps([row.to_json() for row in result.rows])
    json.dumps([result.facts, result.records])
    return result


def rows_of(result: PatternResult) -> dict[tuple[str, str], PatternRow]:
    return {(row.given, row.method): row for row in result.rows}


def mean(row: PatternRow, score: str) -> float:
    return row.scores[score].mean


# --- likelihoods and costs ------------------------------------------------------------------------


def test_likelihoods_do_not_depend_on_batches_or_order(
    case: PatternCase, examples: list[Example]
) -> None:
    panel = ReaderPanel(case, examples)
    pairs = [(i, answer) for i in (5, 0, 11) for answer in ("Tarbek", "a much longer answer")]
    for given in ("text", "payload", "other_payload", "nothing"):
        reader = panel.reader("qwen", given)
        together = reader.likelihoods(pairs)
        for (i, answer), found in zip(pairs, together, strict=True):
            (alone,) = reader.only(i).likelihoods([(0, answer)])
            np.testing.assert_allclose(found.logprobs_Kn, alone.logprobs_Kn, atol=2e-4)
            ids = reader.receiver.reader.prompts.answer_ids(answer)
            assert found.tokens == len(ids) + 1
            assert found.total() == pytest.approx(found.logprobs_Kn[0, :-1].sum())


def test_what_readers_are_given(case: PatternCase, examples: list[Example]) -> None:
    texts = GivenTexts(case.model, examples, batch_size=4)
    own = texts.messages("payload")
    assert own == case.model.encode_payloads([e.context for e in examples])
    other = texts.messages("other_payload")
    assert other is not None
    assert own is not None
    assert all(a != b for a, b in zip(own, other, strict=True))
    assert texts.sizes("text") == [len(e.context.encode()) for e in examples]
    assert texts.sizes("payload") == [*map(len, own)]
    assert texts.sizes("nothing") == [0] * len(examples)
    assert check_given(["nothing", "text", "text"]) == ("text", "nothing")
    with pytest.raises(ConfigError, match="given='texts', expected one of text, payload, other"):
        check_given(["texts"])


def test_texts_that_are_too_long_are_cut_into_several_payloads(case: PatternCase) -> None:
    limit = case.model.encoder.limit.length
    long = "Nulnak lives in Tarbek. " * (2 * limit // 24 + 1)
    examples = [Example("a", "Short.", "Who?", ("x",)), Example("b", long, "Who?", ("x",))]
    payloads = GivenTexts(case.model, examples, batch_size=4).payloads
    assert len(payloads[0]) == 1
    assert len(payloads[1]) > 1


@pytest.mark.parametrize("given", ["text", "payload"])
def test_letters_are_chosen_in_one_pass_or_in_several(
    case: PatternCase, examples: list[Example], given: Any
) -> None:
    reader = ReaderPanel(case, examples[:3]).reader("llama", given)
    letters = [a for a in "abcdefgh" if len(reader.receiver.reader.prompts.answer_ids(a)) == 1][:3]
    fast = reader.choices(letters)
    pairs = [(i, letter) for i in range(3) for letter in letters]
    slow = np.array([found.total() for found in reader.likelihoods(pairs)]).reshape(3, -1)
    np.testing.assert_allclose(fast, slow, atol=2e-4)
    long = reader.choices(["much longer", "than a letter"])
    assert long.shape == (3, 2)


def test_the_temperature_divides_the_logits(readers: dict[str, Reader]) -> None:
    reader = readers["llama"]
    prompts = [reader.prompts.build([Turn("Who?", a)], context="A.") for a in ("Tarbek", "x y")]
    scores = reader.score(prompts)
    plain_N, warm_N = gold_at(scores, (1.0, 2.0))
    torch.testing.assert_close(plain_N, scores.gold_N)
    logits_NV = reader.output_head.logits(scores.hidden_ND)
    expected_NV = (logits_NV / 2).log_softmax(-1)
    torch.testing.assert_close(warm_N, expected_NV.gather(1, scores.labels_N[:, None])[:, 0])


def test_operations_are_counted(case: PatternCase, examples: list[Example]) -> None:
    """A prompt's count is that of its matrices and its attention, whichever kernel computes it."""
    q_BHTd = torch.randn(1, 2, 5, 4)
    assert count_flops(lambda: scaled_dot_product_attention(q_BHTd, q_BHTd, q_BHTd)) == 4 * 2 * 5**2 * 4  # noqa: E501  # fmt: skip
    reader = case.receivers["llama"].reader
    prompt = reader.prompts.build([Turn("Who?", "Tarbek")], context="Nulnak lives in Tarbek.")
    length, scored = len(prompt.ids), sum(prompt.is_target)
    linear = [m for m in reader.model.modules() if isinstance(m, torch.nn.Linear)]
    layers = sum(m.weight.numel() for m in linear if m is not reader.model.lm_head)
    attention = 2 * 4 * length**2 * 32  # layers, two products of two operations, width
    expected = 2 * layers * length + attention + 2 * scored * reader.output_head.weight.numel()
    found = count_flops(lambda: case.receivers["llama"].score([prompt]).gold_N)
    assert found == pytest.approx(expected, rel=0.02)
    payload = ReaderPanel(case, examples[:1]).sender("payload")
    assert payload.gflops > 0
    assert payload.ms > 0


# --- sampling -------------------------------------------------------------------------------------


def test_answers_are_sampled_alike_in_any_batch(case: PatternCase, examples: list[Example]) -> None:
    panel = ReaderPanel(case, examples[:4])
    options = DecodeOptions(max_new_tokens=6, temperature=2.0)
    reader = panel.reader("llama", "text")
    drawn = reader.answers(options, copies=3)
    assert drawn == reader.answers(options, copies=3)
    assert any(len({*own}) > 1 for own in drawn)
    greedy = DecodeOptions(max_new_tokens=6)
    cold = DecodeOptions(max_new_tokens=6, temperature=1e-4)
    assert reader.answers(greedy) == reader.answers(cold)
    with pytest.raises(ConfigError, match="temperature=-1, expected 0 or above"):
        DecodeOptions(temperature=-1)


def test_the_commonest_answer() -> None:
    assert majority(["Paris", "the paris.", "Rome"]) == "Paris"
    assert majority(["Rome", "Paris"]) == "Rome"


# --- what is fitted -------------------------------------------------------------------------------


def test_a_temperature_is_found_where_the_nll_is_lowest() -> None:
    curve = [(np.log(t) - np.log(1.7)) ** 2 for t in TEMPERATURES]
    assert best_temperature(curve) == pytest.approx(1.7)
    assert best_temperature(TEMPERATURES) == TEMPERATURES[0]
    assert 1.0 in TEMPERATURES


def test_the_combiner_is_a_logistic_regression() -> None:
    """Known weights are found again from soft targets; what does not vary has no weight."""
    rng = np.random.default_rng(0)
    features_NF = np.column_stack([rng.normal(3, 2, 400), rng.normal(0, 1, 400), np.ones(400)])
    logits_N = 1.5 * (features_NF[:, 0] - 3) / 2 - 0.5 * features_NF[:, 1] + 0.3
    fitted = Combiner.fit(features_NF, 1 / (1 + np.exp(-logits_N)), names="abc", l2=1e-6)
    np.testing.assert_allclose(fitted.logits(features_NF), logits_N, atol=0.01)
    assert fitted.weights_F[2] == 0
    strong = Combiner.fit(features_NF, 1 / (1 + np.exp(-logits_N)), names="abc", l2=1e6)
    assert np.abs(strong.weights_F).max() < 0.01


# --- patterns -------------------------------------------------------------------------------------


def test_joint_rescoring(case: PatternCase) -> None:
    """The plain sum chooses as `evaluation/joint.py` does; nothing is fitted on what is scored."""
    result = tried(case, "joint_rescoring", "validation=4", count=6)
    assert (result.questions, result.validation) == (6, 4)
    rows = rows_of(result)
    methods = ["llama", "qwen", "sum", "temperature", "logistic", "oracle"]
    assert [*rows] == [(given, method) for given in case.given for method in methods]
    assert set(result.facts["payload"]["combiner"]["weights"]) == {
        "log-probability under llama",
        "log-probability under qwen",
        "length",
        "repetition",
        "answer of qwen",
    }
    records = result.records
    texts = [r["question"] for r in records]
    assert len({*texts}) == 6
    source = {e.id: e for e in _heldout(case)}
    examples = [source[r["id"]] for r in records]
    joint = rescore(
        case.receivers,
        examples,
        mode="context",
        payloads=case.model.encode_payloads([e.context for e in examples]),
        answers={n: [r["payload"][n]["answer"] for r in records] for n in case.readers},
        batch_size=4,
    )
    assert joint.result.predictions == [r["payload"]["sum"]["answer"] for r in records]
    for record, example in zip(records, examples, strict=True):
        for entry in record["text"].values():
            assert entry["f1"] == f1(entry["answer"], example.answers)
    sums = sum(rows["text", name].cost.gflops for name in case.readers)
    assert rows["text", "sum"].cost.gflops > sums
    assert rows["text", "sum"].cost.sender_gflops == 0 < rows["payload", "sum"].cost.sender_gflops


def _heldout(case: PatternCase) -> Iterator[Example]:
    return iter(heldout_examples(case.config.data, count=10))


def mmlu_folder(path: Path) -> Path:
    """Two subjects, as MMLU's files: one with a header row and numbers, one without and letters."""
    for split, count in (("dev", 2), ("test", 3)):
        (path / split).mkdir(parents=True)
        for subject in SUBJECTS:
            rows = [
                [f"{subject} {split} {i}?", "one", "two", "three", "four", i] for i in range(count)
            ]
            if subject == "law":
                rows = [[*row[:-1], "ABCD"[int(row[-1])]] for row in rows]
            else:
                rows.insert(0, ["question", "choice0", "choice1", "choice2", "choice3", "answer"])
            with (path / split / f"{subject}_{split}.csv").open("w", newline="") as file:
                csv.writer(file).writerows(rows)
    return path


def test_routing(case: PatternCase, tmp_path: Path) -> None:
    data = f"mmlu={mmlu_folder(tmp_path / 'mmlu')}"
    result = tried(case, "routing", data=data)
    assert (result.questions, result.validation) == (6, 4)
    rows = rows_of(result)
    names = ["llama", "qwen", "routed", "joint", "oracle"]
    assert [method for given, method in rows if given == "text"] == [
        f"{name} ({answers})" for answers in ("letters", "texts") for name in names
    ]
    for (given, method), row in rows.items():
        name, answers = method.removesuffix(")").split(" (")
        subjects = result.facts["subjects"][f"{given}, {answers}"]
        weighted = sum(own["questions"] * own[name] for own in subjects.values())
        assert mean(row, "accuracy") == pytest.approx(weighted / 6)
        assert all(own["routed"] == own[own["reader"]] for own in subjects.values())
    cost = {name: rows["text", f"{name} (letters)"].cost.gflops for name in names}
    assert min(cost["llama"], cost["qwen"]) <= cost["routed"] <= max(cost["llama"], cost["qwen"])
    assert cost["joint"] == pytest.approx(cost["llama"] + cost["qwen"])
    few = tried(case, "routing", "per_subject=1", 'subjects=["law"]', data=data, given=("text",))
    assert few.questions == 1
    other = tried(case, "routing", "validation=test", "validation_rows=1", data=data, count=3)
    assert (other.questions, other.validation) == (3, 2)


def marco_file(path: Path) -> Path:
    """Three queries in the form of MS MARCO's rows."""
    rows = [
        {
            "query_id": i,
            "query": f"who lives with {name}",
            "answers": [f"in {place}"],
            "passages": {
                "is_selected": [0, 1, 0],
                "passage_text": ["Nothing.", f"{name} lives in {place}.", f"{name} is old."],
            },
        }
        for i, (name, place) in enumerate([("Ana", "Rome"), ("Bo", "Oslo"), ("Cy", "Nice")])
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_two_stages(case: PatternCase, tmp_path: Path) -> None:
    data = f"ms_marco={marco_file(tmp_path / 'marco.jsonl')}"
    result = tried(case, "two_stage", "depth=2", data=data)
    rows = rows_of(result)
    assert [*rows] == [
        ("text", "BM25 (the file's order)"),
        ("text", "llama ranks, qwen answers"),
        ("text", "BM25 ranks, qwen answers"),
        ("payload", "llama ranks, qwen answers"),
        ("payload", "BM25 ranks, qwen answers"),
    ]
    assert result.facts["relevant_grade"] == 1
    assert mean(rows["text", "BM25 (the file's order)"], "mrr@10") == 0.5  # always the second
    assert {*rows["text", "BM25 ranks, qwen answers"].scores} == {"mrr@10", "ndcg@10", "f1"}
    for record in result.records:
        own = record["payload"]["llama ranks"]
        assert own["best"] == max(own["query_logprobs"], key=own["query_logprobs"].get)


def test_two_stages_with_the_judgements_of_trec(case: PatternCase, tmp_path: Path) -> None:
    """Grades up to 3, no answers, an order of our own, and one reader for both stages."""
    hits = [
        {"content": text, "qid": 7, "docid": str(i), "score": 1.0}
        for i, text in enumerate(["Nothing.", "Ana lives in Rome.", "Ana is old."])
    ]
    (tmp_path / "hits.json").write_text(json.dumps([{"query": "where Ana lives", "hits": hits}]))
    (tmp_path / "qrels.txt").write_text("7 Q0 1 3\n7 Q0 2 1\n")
    options = ("first_stage=bm25s", "ranker=qwen", "answerer=qwen")
    data = f"trec={tmp_path / 'hits.json'}"
    result = tried(case, "two_stage", *options, data=data, given=("text",))
    assert result.facts["relevant_grade"] == 2
    assert [row.method for row in result.rows] == ["BM25 (bm25s)"] + [
        f"{ranker} ranks, qwen answers" for ranker in ("qwen", "BM25")
    ]
    assert mean(result.rows[0], "mrr@10") == 1
    assert {*result.rows[1].scores} == {"mrr@10", "ndcg@10"}
    assert result.facts["f1"] == "not measured: the data has no answers"


def test_bm25_searches_the_passages_of_all_queries(tmp_path: Path) -> None:
    spec = f"ms_marco={marco_file(tmp_path / 'marco.jsonl')}"
    found = retrieved(load_examples(spec, split="heldout", count=None, seed=0, whole=True))
    for search in found:
        assert search.ranking is not None
        assert len(search.ranking.passages) == 3
        name = search.question.split()[-1]
        assert search.ranking.passages[0].text.startswith(f"{name} lives")


@pytest.mark.parametrize(
    ("name", "queries", "published"), [("dl19", 43, 0.5058), ("dl20", 54, 0.4796)]
)
def test_bm25_of_the_real_hits_scores_as_published(
    name: str, queries: int, published: float
) -> None:
    """NDCG@10 of BM25 as Anserini publishes it; and the scores of a library, to the last digit."""
    spec = f"trec={real_file(f'msmarco_{name}_bm25_top100.json.xz')}"
    found = load_examples(spec, split="heldout", count=None, seed=0, whole=True)
    rankings = {e.id: e.ranking for e in found if e.ranking is not None}
    assert len(rankings) == queries
    orders = {query: [p.id for p in own.passages] for query, own in rankings.items()}
    qrels = {query: dict(own.grades) for query, own in rankings.items()}
    scores = {query: ndcg(order, qrels[query], limit=10) for query, order in orders.items()}
    assert sum(scores.values()) / queries == pytest.approx(published, abs=5e-5)
    pytrec_eval = pytest.importorskip("pytrec_eval")
    ours = {q: mrr(order, qrels[q], limit=10, relevant=2) for q, order in orders.items()}
    for level, measure, expected in ((1, "ndcg_cut.10", scores), (2, "recip_rank", ours)):
        judge = pytrec_eval.RelevanceEvaluator(qrels, {measure}, relevance_level=level)
        # Its own order is by score: that of the ten first, which is all that counts.
        run = {q: {p: 1.0 / (i + 1) for i, p in enumerate(o[:10])} for q, o in orders.items()}
        theirs = {q: own[measure.replace(".", "_")] for q, own in judge.evaluate(run).items()}
        assert theirs == pytest.approx(expected, abs=1e-12)


def truthful_file(path: Path) -> Path:
    """Two questions in the form of TruthfulQA.csv."""
    rows = [
        [
            "\ufeffType",
            "Category",
            "Question",
            "Best Answer",
            "Correct Answers",
            "Incorrect Answers",
        ],
        ["Adversarial", "Myths", "Is the moon cheese?", "No", "No; It is rock.", "Yes; It is brie"],
        ["Adversarial", "Law", "May cats vote?", "Cats may not", "Cats may not; No", "Cats may"],
    ]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def test_truthful(case: PatternCase, tmp_path: Path) -> None:
    data = f"truthful_qa={truthful_file(tmp_path / 'TruthfulQA.csv')}"
    result = tried(case, "truthful", "samples=2", data=data)
    rows = rows_of(result)
    methods = ["llama", "qwen", "mutual"]
    answers = [*methods, "llama, commonest of 2", "qwen, commonest of 2", "all, commonest of 4"]
    expected = [*(f"{m} (options)" for m in methods), *(f"{m} (answer)" for m in answers)]
    assert [method for given, method in rows if given == "payload"] == expected
    assert 0 < mean(rows["text", "mutual (options)"], "mc2") < 1
    for record in result.records:
        own = record["text"]
        assert own["mutual"] in (own["llama"], own["qwen"])
    options = tried(case, "truthful", "generate=false", data=data, count=1, given=("nothing",))
    assert [row.method for row in options.rows] == [f"{m} (options)" for m in methods]


def test_an_answer_is_truthful_if_it_is_nearer_to_a_correct_one() -> None:
    question = Choices(("Cats may not.", "They may."), (0,), 0)
    assert is_truthful("cats may not", question) == 1
    assert is_truthful("they may", question) == 0
    assert is_truthful("", question) == 0


# --- rankings -------------------------------------------------------------------------------------


def test_scores_of_rankings() -> None:
    grades = {"a": 3, "b": 0, "c": 2, "d": 1}
    assert mrr(["b", "d", "c", "a"], grades, limit=10, relevant=2) == pytest.approx(1 / 3)
    assert mrr(["b", "d", "c", "a"], grades, limit=2, relevant=2) == 0
    assert ndcg(["a", "c", "d"], grades, limit=10) == 1
    expected = (2 / 1 + 3 / np.log2(3)) / (3 + 2 / np.log2(3) + 1 / np.log2(4))
    assert ndcg(["c", "a", "unknown"], grades, limit=10) == pytest.approx(expected)
    assert ndcg(["b"], {"b": 0}, limit=10) == 0


# --- settings and the terminal --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nobody", (), "no pattern 'nobody'; there are joint_rescoring, routing, two_stage"),
        ("routing", ("per_subject",), "--option 'per_subject': expected FIELD=VALUE"),
        ("routing", ("per_subject=0",), "per_subject=0, expected at least 1"),
        ("routing", ("rows=3",), "routing: .*rows"),
        ("routing", ("answers=[]",), "answers is empty, expected letters, texts or both"),
        ("truthful", ("temperature=0",), "temperature=0, expected above 0"),
        ("joint_rescoring", ("l2=-1",), "l2=-1, expected at least 0"),
    ],
)
def test_settings_that_cannot_be(name: str, options: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pattern_config(name, options)


def test_what_a_pattern_needs(case: PatternCase, tmp_path: Path) -> None:
    alone = {"llama": case.receivers["llama"]}
    for name in ("joint_rescoring", "routing", "truthful"):
        with pytest.raises(ConfigError, match="two readers or more, this run has llama alone"):
            tried(case, name, receivers=alone)
    with pytest.raises(ConfigError, match="no data is named; give it as --data truthful_qa=FILE"):
        tried(case, "truthful")
    data = f"ms_marco={marco_file(tmp_path / 'marco.jsonl')}"
    with pytest.raises(ConfigError, match="ranker='nobody': this run has llama, qwen"):
        tried(case, "two_stage", "ranker=nobody", data=data)
    mmlu = f"mmlu={mmlu_folder(tmp_path / 'mmlu')}"
    with pytest.raises(DataError, match="no subject 'art' in the data; there are astronomy, law"):
        tried(case, "routing", 'subjects=["art"]', data=mmlu)
    with pytest.raises(DataError, match="no example that this pattern needs; give --data truthful"):
        tried(case, "truthful", data=data)


def test_the_table(case: PatternCase, tmp_path: Path) -> None:
    result = tried(case, "two_stage", data=f"ms_marco={marco_file(tmp_path / 'm.jsonl')}", count=2)
    lines = pattern_lines(
        {
            "pattern": "two_stage",
            "data": "m.jsonl",
            "questions": result.questions,
            "validation": 0,
            "rows": [row.to_json() for row in result.rows],
        }
    )
    assert lines[0] == "Ranking and answering: 2 questions (m.jsonl)"
    assert lines[1].split()[:4] == ["given", "method", "mrr@10", "ndcg@10"]
    assert lines[2].startswith("text     BM25 (the file's order)")
    assert len(lines) == 2 + len(result.rows)
