"""Evaluation of a tiny untrained model: fixed formats, bytes (B1), same scores (D1, D2), sums."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from latentwire_fast import wire
from latentwire_fast.config.schema import (
    DataConfig,
    EvalConfig,
    ReaderConfig,
    RunConfig,
    StageConfig,
)
from latentwire_fast.config.serialization import to_json
from latentwire_fast.data.examples import Example
from latentwire_fast.data.testbed import make_examples
from latentwire_fast.errors import CheckpointError, ConfigError
from latentwire_fast.evaluation.console import summary_lines
from latentwire_fast.evaluation.evaluator import Evaluator
from latentwire_fast.evaluation.methods.base import EvaluationCase, evaluation_methods
from latentwire_fast.evaluation.metrics import exact_match, f1, normalize_answer
from latentwire_fast.evaluation.model_card import model_card
from latentwire_fast.evaluation.pipeline import evaluate_run, stored_metrics
from latentwire_fast.evaluation.report import write_report
from latentwire_fast.evaluation.report.text_bytes import COMPRESSORS
from latentwire_fast.evaluation.scoring import Scorer
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.prompts.builder import PromptBuilder, Turn, full_text
from latentwire_fast.readers.decoding import DecodeOptions
from latentwire_fast.readers.reader import Reader
from latentwire_fast.serving import Receiver
from latentwire_fast.serving.prefixes import TrainedParts
from readers import BUDGETS_IN_BYTES, METHODS, tiny_interlingua, tiny_model

pytestmark = pytest.mark.usefixtures("on_the_cpu")

BITS = ("16", "8", "6", "4")
BY_BITS = tuple(f"{name}_bits" for name in ("latent", *BUDGETS_IN_BYTES))
ALL_METHODS = {*METHODS, "first_words"}
SHORTENED = ("selective_context", "bm25_sentences")
UNTIMED = ("shuffled_latent", "zero_latent", *SHORTENED, *(f"{name}_bytes" for name in SHORTENED))
INTERVALS = ("f1", "em", "first_token_top1", "first_token_top5", "nll_per_token", "diversity")
TIMES = {"prefill_ms_p50", "end_to_end_ms_p50"}
METHOD_KEYS = {*INTERVALS, *TIMES, "prefix_positions_mean"}
RUN_KEYS = {
    *("name", "preset", "mode", "seed", "commit", "config_sha256", "device", "versions"),
    *("eval_seed", "wall_seconds", "vocab_sizes", "command"),
}
HYPOTHESIS_KEYS = {"value", "low", "high", "bar", "verdict"}

Measured = tuple[dict[str, Any], list[dict[str, Any]]]


def make_config(folders: dict[str, Path], model: Interlingua, **evaluation: Any) -> RunConfig:
    """A run of this model on these readers."""
    options = {"batch_size": 16, "max_new_tokens": 4, "timing_examples": 2, "resamples": 50}
    return RunConfig(
        mode=model.mode,
        seed=3,
        readers={name: ReaderConfig(str(folder)) for name, folder in folders.items()},
        encoder=model.encoder_config,
        bottleneck=model.bottleneck_config,
        attachments=model.attachment_configs,
        data=DataConfig(eval_examples=6, facts=2),
        stages=(StageConfig("answer", steps=1),),
        evaluation=EvalConfig(**{**options, **evaluation}),
    )


@pytest.fixture(scope="module")
def folders(llama_folder: Path, qwen_folder: Path) -> dict[str, Path]:
    return {"llama": llama_folder, "qwen": qwen_folder}


@pytest.fixture(scope="module")
def model(readers: dict[str, Reader]) -> Interlingua:
    return tiny_interlingua(readers, "context")


def evaluate(
    config: RunConfig, model: Interlingua, readers: dict[str, Reader], examples: list[Example]
) -> Measured:
    """The content of metrics.json and of predictions.jsonl."""
    results = Evaluator(config, model, readers, examples, progress=False).run()
    return results.metrics(), results.records()


@pytest.fixture(scope="module")
def measured(
    folders: dict[str, Path],
    model: Interlingua,
    readers: dict[str, Reader],
    examples: list[Example],
) -> Measured:
    """Sixteen examples in context mode."""
    return evaluate(make_config(folders, model), model, readers, examples)


def without_times(metrics: dict[str, Any]) -> dict[str, Any]:
    """The parts of metrics.json that the clock does not decide."""
    readers = {
        name: {
            method: {k: v for k, v in entry.items() if k not in TIMES}
            for method, entry in methods.items()
        }
        for name, methods in metrics["readers"].items()
    }
    hypotheses = {k: v for k, v in metrics["hypotheses"].items() if k != "H5"}
    hypotheses["H8"] = {k: v for k, v in hypotheses["H8"].items() if k != "first_token_ms_p50"}
    coded = {
        name: {k: v for k, v in entry.items() if k != "first_token_ms_p50"}
        for name, entry in metrics["coded_text"]["readers"].items()
    }
    coded_text = {**metrics["coded_text"], "readers": coded}
    return {**metrics, "readers": readers, "hypotheses": hypotheses, "coded_text": coded_text}


def predictions_of(records: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """(where, what) of everything that was decoded."""
    for record in records:
        for name, methods in record["readers"].items():
            for method in ALL_METHODS:
                yield f"{record['id']} {name} {method}", methods[method]["prediction"]
            for bits, entry in methods["latent_bits"].items():
                yield f"{record['id']} {name} {bits} bits", entry["prediction"]
        yield f"{record['id']} joint", record["joint"]["prediction"]


# --- formats ------------------------------------------------------------------------------------


def check_interval(entry: dict[str, float]) -> None:
    assert set(entry) == {"mean", "low", "high"}
    assert entry["low"] <= entry["mean"] <= entry["high"]
    assert all(math.isfinite(v) for v in entry.values())


def check_metrics(metrics: dict[str, Any], *, examples: int) -> None:
    """The scored parts of metrics.json against its fixed schema."""
    assert metrics["examples"] == examples
    assert metrics["latent"] == {"M": 4, "d_z": 8, "bits": 6, "group_size": 16}
    assert set(metrics["bytes"]) == {"payload_mean", "text_coded_mean", *COMPRESSORS}
    check_coded(metrics)
    assert tuple(metrics["bytes"]["payload_mean"]) == BITS
    assert set(metrics["readers"]) == {"llama", "qwen"}
    for methods in metrics["readers"].values():
        assert set(methods) == ALL_METHODS | {*BY_BITS}
        for method in METHODS:
            entry = methods[method]
            assert set(entry) == METHOD_KEYS
            for key in INTERVALS:
                check_interval(entry[key])
            assert entry["prefix_positions_mean"] >= 0
            if method in UNTIMED:
                assert entry["prefill_ms_p50"] is entry["end_to_end_ms_p50"] is None
            else:
                assert min(entry["prefill_ms_p50"], entry["end_to_end_ms_p50"]) > 0
        floor = methods["first_words"]  # without a model there is no likelihood
        assert set(floor) == METHOD_KEYS
        for key in ("f1", "em", "diversity"):
            check_interval(floor[key])
        assert floor["nll_per_token"] is None
        for key in BY_BITS:
            assert tuple(methods[key]) == BITS
            assert all(set(entry) == {"f1", "em"} for entry in methods[key].values())
    for name, others in metrics["latent_minus"].items():
        assert set(others) == ALL_METHODS - {"latent"}
        for key, entry in others.items():
            assert set(entry) == {"nll_per_token", "f1"}
            for score in ("nll_per_token", "f1"):
                if key == "first_words" and score == "nll_per_token":
                    assert entry[score] is None
                    continue
                check_interval(entry[score])
                latent, other = (metrics["readers"][name][m][score] for m in ("latent", key))
                assert entry[score]["mean"] == pytest.approx(latent["mean"] - other["mean"])
    assert set(metrics["joint"]) == {"f1", "best_single_f1", "agreement", "oracle_f1"}
    assert list(metrics["hypotheses"]) == [f"H{i}" for i in range(1, 9)]
    for entry in metrics["hypotheses"].values():
        assert set(entry) >= HYPOTHESIS_KEYS
        assert entry["verdict"] in ("pass", "fail", "not measured")
    json.dumps(metrics, allow_nan=False)


def check_coded(metrics: dict[str, Any]) -> None:
    """The texts in their shortest forms."""
    sizes, coded = metrics["bytes"], metrics["coded_text"]
    assert set(coded) == {"readers", "zstd_dictionary", "not_measured"}
    for name in metrics["readers"]:
        entry = coded["readers"][name]
        assert sizes["text_coded_mean"][name] > 0
        expected = 8 * sizes["text_coded_mean"][name] / sizes["text_utf8_mean"]
        assert entry["bits_per_byte"] == pytest.approx(expected)
        sample, times = entry["sample"], entry["first_token_ms_p50"]
        assert sample["examples"] == sample["decoded_equal"] == 2  # as many as are timed
        assert sample["bytes_mean"] <= 1.02 * sample["information_mean"] + 1
        assert set(times) == {"payload", "unpacking", "coded_text"}
        assert times["payload"] > 0  # whether it is less is measured, not tested
        assert 0 < times["unpacking"] < times["coded_text"]  # the second holds the first
        assert entry["lost"] == 0
    for name in ("zstd", "zstd_dictionary"):
        assert (sizes[f"text_{name}_mean"] is None) == (name in coded["not_measured"])


def check_records(records: list[dict[str, Any]], examples: list[Example]) -> None:
    """predictions.jsonl against its fixed form, in the examples' order."""
    assert [r["id"] for r in records] == [e.id for e in examples]
    for record, e in zip(records, examples, strict=True):
        assert set(record) == {
            *("id", "question", "answers", "context", "text_utf8_bytes", "text_brotli_bytes"),
            *("payload_bytes", "readers", "joint"),
        }
        assert (record["question"], record["context"]) == (e.question, e.context)
        assert record["answers"] == list(e.answers)
        assert set(record["payload_bytes"]) == set(BITS)
        for methods in record["readers"].values():
            assert set(methods) == ALL_METHODS | {*BY_BITS}
            for method in METHODS:
                assert set(methods[method]) == {
                    *("prediction", "em", "f1", "positions", "gold_logprobs"),
                    *("first_token_id", "first_token_reciprocal_rank", "nll", "tokens"),
                }
                assert 1 < len(methods[method]["gold_logprobs"]) <= 4
            assert set(methods["first_words"]) == {"prediction", "em", "f1"}
            assert set(methods["latent_bits"]) == set(BITS)
            for entry in methods["latent_bits"].values():
                assert set(entry) == {"prediction", "em", "f1"}
        assert set(record["joint"]) == {"prediction", "em", "f1", "scores"}
    json.dumps(records, allow_nan=False)


def test_the_formats_in_context_mode(measured: Measured, examples: list[Example]) -> None:
    check_metrics(measured[0], examples=16)
    check_records(measured[1], examples)


def test_the_formats_in_pure_mode(
    folders: dict[str, Path], readers: dict[str, Reader], examples: list[Example]
) -> None:
    pure = tiny_interlingua(readers, "pure")
    few = examples[::4]
    metrics, records = evaluate(make_config(folders, pure), pure, readers, few)
    check_metrics(metrics, examples=4)
    check_records(records, few)
    for record, e in zip(records, few, strict=True):  # the payload stands for the question too
        text = full_text(e.context, e.question)
        assert record["text_utf8_bytes"] == len(text.encode())
        assert record["text_brotli_bytes"] == wire.brotli_bytes(text)


def test_one_reader_has_no_joint_answer(
    folders: dict[str, Path],
    model: Interlingua,
    readers: dict[str, Reader],
    examples: list[Example],
) -> None:
    config = make_config({"qwen": folders["qwen"]}, model)
    metrics, records = evaluate(config, model, {"qwen": readers["qwen"]}, examples[:3])
    assert metrics["joint"] is None
    assert metrics["hypotheses"]["H4"]["verdict"] == "not measured"
    assert [r["joint"] for r in records] == [None] * 3


def test_examples_without_an_answer_are_left_out(
    folders: dict[str, Path],
    model: Interlingua,
    readers: dict[str, Reader],
    examples: list[Example],
) -> None:
    unanswerable = dataclasses.replace(examples[0], answers=())
    evaluator = Evaluator(
        make_config(folders, model), model, readers, [unanswerable, *examples[1:3]], progress=False
    )
    assert evaluator.examples == examples[1:3]


def test_one_context_has_no_shuffled_latent(
    folders: dict[str, Path],
    model: Interlingua,
    readers: dict[str, Reader],
    examples: list[Example],
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    """Its own payload would stand in for another's, and look as good as the latent."""
    metrics, records = evaluate(make_config(folders, model), model, readers, examples[:1])
    reason = "all examples have the same context, so no other example's payload can be taken"
    assert metrics["not_measured"] == {"shuffled_latent": reason}
    assert f"shuffled_latent is not measured: {reason}" in caplog.text
    for methods in (*metrics["readers"].values(), *records[0]["readers"].values()):
        assert list(methods) == [*METHODS, "first_words", *BY_BITS]
        assert methods["shuffled_latent"] is None
        assert methods["latent"] is not None
    metrics["run"] = {"mode": "context", "commit": "", "name": "", "config_sha256": ""}
    assert f"{'shuffled latent':18}{'-':>12}{'-':>12}" in summary_lines(metrics)
    assert f"shuffled latent: not measured, {reason}" in summary_lines(metrics)
    assert "| shuffled latent |" in model_card(make_config(folders, model), metrics)
    write_report(tmp_path, metrics=metrics, predictions=records, diagnostics=[], config={})
    report = (tmp_path / "report.md").read_text()
    assert f"Shuffled latent was not measured: {reason}." in report
    assert "| Shuffled latent | \N{EM DASH} |" in report


def test_only_the_methods_that_are_asked_for_are_scored(
    folders: dict[str, Path],
    model: Interlingua,
    readers: dict[str, Reader],
    examples: list[Example],
    measured: Measured,
    run_dir: Path,
) -> None:
    config = make_config(folders, model, methods=("latent", "text"))
    metrics, records = evaluate(config, model, readers, examples)
    for name, methods in metrics["readers"].items():
        assert set(methods) == {"text", "latent", "latent_bits"}
        assert methods["latent"]["f1"] == measured[0]["readers"][name]["latent"]["f1"]
    assert "not_measured" not in metrics
    assert metrics["hypotheses"]["H2"]["verdict"] == "not measured"
    assert [r["joint"] for r in records] == [r["joint"] for r in measured[1]]
    shorter = evaluate_run(run_dir, assignments=['evaluation.methods=["latent"]'], progress=False)
    assert all(set(m) == {"latent", "latent_bits"} for m in shorter["readers"].values())
    assert any(line.startswith("latent") for line in summary_lines(shorter))
    assert (run_dir / "eval" / "report.html").is_file()
    with pytest.raises(ConfigError, match=r"methods=\['txt'\], expected names out of text, latent"):
        EvalConfig(methods=("txt", "latent"))
    with pytest.raises(ConfigError, match="'latent' is not among them"):
        EvalConfig(methods=("text",))


def test_never_more_than_one_batch_of_prefixes_is_held(
    folders: dict[str, Path],
    model: Interlingua,
    readers: dict[str, Reader],
    examples: list[Example],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Deep prefixes of 1,000 examples would be 8.4 GB on the shapes of an 8B reader."""
    make, alive, counts = TrainedParts.__call__, {}, []

    def counted(*args: Any, **options: Any) -> Any:
        given = make(*args, **options)
        number = len(counts)
        alive[number] = len(given.soft)
        weakref.finalize(given.soft, alive.pop, number)
        counts.append(sum(alive.values()))
        return given

    monkeypatch.setattr(TrainedParts, "__call__", counted)
    evaluate(make_config(folders, model, batch_size=3), model, readers, examples)
    assert max(counts) == 3


# --- B1: bytes ----------------------------------------------------------------------------------


def test_reported_bytes_are_those_of_the_payload_files(
    measured: Measured, model: Interlingua, examples: list[Example], tmp_path: Path
) -> None:
    metrics, records = measured
    for bits in BITS:
        total = 0
        for record, e in zip(records, examples, strict=True):
            (payload,) = model.encode_payloads([e.context], bits=int(bits))
            path = tmp_path / "x.lwire"
            wire.write_payloads(path, [payload])
            assert record["payload_bytes"][bits] == len(payload) == path.stat().st_size
            total += len(payload)
        assert metrics["bytes"]["payload_mean"][bits] == total / len(examples)


def test_the_text_is_what_the_payload_replaces(
    measured: Measured, examples: list[Example], tmp_path: Path
) -> None:
    metrics, records = measured
    for record, e in zip(records, examples, strict=True):
        path = tmp_path / "x.txt"
        path.write_text(e.context, encoding="utf-8")
        assert record["text_utf8_bytes"] == path.stat().st_size
        assert record["text_brotli_bytes"] == wire.brotli_bytes(e.context)
    for key in ("text_utf8", "text_brotli"):
        values = [r[f"{key}_bytes"] for r in records]
        assert metrics["bytes"][f"{key}_mean"] == sum(values) / len(values)


def test_the_byte_budget_is_the_payload_at_the_runs_width(
    measured: Measured, readers: dict[str, Reader], examples: list[Example]
) -> None:
    for record, e in zip(measured[1], examples, strict=True):
        kept = e.context[: record["payload_bytes"]["6"]]  # ASCII: a byte a character
        for name, reader in readers.items():
            positions = record["readers"][name]["byte_budget"]["positions"]
            assert positions == len(reader.prompts.text_ids(f" {kept}"))


# --- the arithmetic -----------------------------------------------------------------------------


def test_scores_are_those_of_the_recorded_predictions(measured: Measured) -> None:
    metrics, records = measured
    for name, methods in metrics["readers"].items():
        for method in ALL_METHODS:
            entries = [r["readers"][name][method] for r in records]
            for key, score in (("f1", f1), ("em", exact_match)):
                values = [
                    score(entry["prediction"], r["answers"])
                    for entry, r in zip(entries, records, strict=True)
                ]
                assert [entry[key] for entry in entries] == values
                assert methods[method][key]["mean"] == pytest.approx(sum(values) / len(values))
            distinct = len({entry["prediction"] for entry in entries}) / len(entries)
            assert methods[method]["diversity"]["mean"] == pytest.approx(distinct)
        for key, bits in itertools.product(BY_BITS, BITS):
            values = [r["readers"][name][key][bits]["f1"] for r in records]
            assert methods[key][bits]["f1"] == pytest.approx(sum(values) / len(values))


def test_likelihoods_are_those_of_the_gold_answer_given_the_whole_text(
    measured: Measured, readers: dict[str, Reader], examples: list[Example]
) -> None:
    metrics, records = measured
    for name, reader in readers.items():
        nll, tokens, top1, top5 = 0.0, 0, [], []
        for e, record in zip(examples, records, strict=True):
            entry = record["readers"][name]["text"]
            prompt = reader.prompts.build([Turn(e.question, e.answers[0])], context=e.context)
            gold = [*reader.prompts.answer_ids(e.answers[0]), reader.prompts.eos_id]
            with torch.no_grad():
                logits = reader.model(input_ids=torch.tensor([prompt.ids])).logits[0]
            logprobs = logits[-len(gold) - 1 : -1].log_softmax(-1)
            expected = [logprobs[t, token].item() for t, token in enumerate(gold)]
            assert entry["gold_logprobs"] == pytest.approx(expected[:4], abs=1e-4)
            assert entry["nll"] == pytest.approx(-sum(expected), abs=1e-3)
            assert entry["tokens"] == len(expected)
            assert entry["first_token_id"] == logprobs[0].argmax().item()
            top1.append(entry["first_token_id"] == gold[0])
            top5.append(gold[0] in logprobs[0].topk(5).indices.tolist())
            nll -= sum(expected)
            tokens += len(gold)
        text = metrics["readers"][name]["text"]
        assert text["nll_per_token"]["mean"] == pytest.approx(nll / tokens, rel=1e-5)
        assert text["first_token_top1"]["mean"] == pytest.approx(sum(top1) / len(top1))
        assert text["first_token_top5"]["mean"] == pytest.approx(sum(top5) / len(top5))


def test_embedding_replay_equals_text(measured: Measured) -> None:
    metrics, records = measured
    for name, methods in metrics["readers"].items():
        for key in ("f1", "em", "diversity", "prefix_positions_mean"):
            assert methods["embedding_replay"][key] == methods["text"][key]
        for record in records:
            text, replay = (record["readers"][name][m] for m in ("text", "embedding_replay"))
            assert replay["prediction"] == text["prediction"]
            assert replay["gold_logprobs"] == pytest.approx(text["gold_logprobs"], abs=1e-4)


def test_the_latent_is_judged_at_the_runs_own_width(measured: Measured) -> None:
    for record in measured[1]:
        for methods in record["readers"].values():
            latent = {k: methods["latent"][k] for k in ("prediction", "em", "f1")}
            assert latent == methods["latent_bits"]["6"]
            for name in BUDGETS_IN_BYTES:
                cut = {k: methods[name][k] for k in ("prediction", "em", "f1")}
                assert cut == methods[f"{name}_bits"]["6"]


def test_fewer_bytes_hold_a_shorter_text(model: Interlingua, readers: dict[str, Reader]) -> None:
    example = make_examples(1, seed=3)[0]
    payloads = {8: [bytes(90)], 4: [bytes(30)]}
    case = EvaluationCase(model, readers["llama"], [example], payloads)
    methods = evaluation_methods()
    own, short = (
        methods["byte_budget"].build(case, range(1), bits=bits).positions[0] for bits in (8, 4)
    )
    (whole,) = methods["text"].build(case, range(1), bits=8).positions
    assert short < own < whole


def test_a_text_that_was_read_is_not_read_again(
    model: Interlingua, readers: dict[str, Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A budget above the text's size is the whole text: the same scores, and no second reading."""
    examples = make_examples(4, seed=3)
    case = EvaluationCase(model, readers["llama"], examples, {8: [bytes(9000)] * 4})
    methods, read = evaluation_methods(), []
    receiver = Receiver.of(model, readers["llama"])
    generate = receiver.generate

    def counted(prompts: Any, **options: Any) -> Any:
        read.append(len(prompts))
        return generate(prompts, **options)

    monkeypatch.setattr(receiver, "generate", counted)
    scorer = Scorer(case, receiver, DecodeOptions(max_new_tokens=4), batch_size=3)
    decoded = scorer.decode(methods["text"], bits=8)
    text = scorer.score(methods["text"], bits=8)  # its likelihoods were not known yet
    assert (read, text.predictions) == ([3, 1, 3, 1], decoded.predictions)
    assert scorer.score(methods["byte_budget"], bits=8) == text
    assert scorer.decode(methods["byte_budget"], bits=8).f1 == text.f1
    assert read == [3, 1, 3, 1]
    scorer.score(methods["closed_book"], bits=8)
    assert read == [3, 1, 3, 1, 3, 1]


# --- joint rescoring ----------------------------------------------------------------------------


def test_the_joint_answer_is_the_candidate_with_the_higher_total(measured: Measured) -> None:
    metrics, records = measured
    chosen = set()
    for record in records:
        candidates = {n: m["latent"]["prediction"] for n, m in record["readers"].items()}
        totals = record["joint"]["scores"]
        best = max(totals, key=totals.get)
        assert set(totals) == set(candidates)
        assert record["joint"]["prediction"] == candidates[best]
        assert record["joint"]["f1"] == record["readers"][best]["latent"]["f1"]
        chosen.add(best)
    assert chosen == {"llama", "qwen"}  # both win somewhere, so the choice is one
    joint = metrics["joint"]
    latent = [[r["readers"][n]["latent"] for r in records] for n in ("llama", "qwen")]
    count = len(records)
    assert joint["f1"] == pytest.approx(sum(r["joint"]["f1"] for r in records) / count)
    assert joint["best_single_f1"] == max(sum(e["f1"] for e in one) / count for one in latent)
    best_each = [max(pair, key=lambda e: e["f1"])["f1"] for pair in zip(*latent, strict=True)]
    assert joint["oracle_f1"] == pytest.approx(sum(best_each) / count)
    same = [
        normalize_answer(a["prediction"]) == normalize_answer(b["prediction"])
        for a, b in zip(*latent, strict=True)
    ]
    assert joint["agreement"] == sum(same) / count


def test_a_total_is_the_sum_of_both_readers_mean_log_probabilities(
    measured: Measured, model: Interlingua, readers: dict[str, Reader], examples: list[Example]
) -> None:
    for record, e in list(zip(measured[1], examples, strict=True))[::5]:
        latent = model.decode_payloads(model.encode_payloads([e.context]))
        for candidate, total in record["joint"]["scores"].items():
            answer = record["readers"][candidate]["latent"]["prediction"]
            expected = 0.0
            for name, reader in readers.items():
                prompt = reader.prompts.build(
                    [Turn(e.question, answer)], context=None, latent="context"
                )
                with torch.no_grad():
                    scores = reader.score([prompt], prefixes=model.prefix(name, latent))
                expected += scores.gold_N.mean().item()
            assert total == pytest.approx(expected, abs=1e-4)


# --- D1, D2: the same scores again, and in batches of any size ----------------------------------


def test_the_same_seed_gives_the_same_scores(
    measured: Measured,
    folders: dict[str, Path],
    model: Interlingua,
    readers: dict[str, Reader],
    examples: list[Example],
) -> None:
    torch.manual_seed(12345)  # the global generator has no say
    again = evaluate(make_config(folders, model), model, readers, examples)
    assert without_times(again[0]) == without_times(measured[0])
    assert again[1] == measured[1]


def test_batches_of_one_give_the_predictions_of_batches_of_sixteen(
    measured: Measured,
    folders: dict[str, Path],
    model: Interlingua,
    readers: dict[str, Reader],
    examples: list[Example],
) -> None:
    config = make_config(folders, model, batch_size=1)
    single = evaluate(config, model, readers, examples)
    assert dict(predictions_of(single[1])) == dict(predictions_of(measured[1]))
    for one, sixteen in zip(single[1], measured[1], strict=True):
        for name, methods in one["readers"].items():
            for method in METHODS:
                assert methods[method]["gold_logprobs"] == pytest.approx(
                    sixteen["readers"][name][method]["gold_logprobs"], abs=1e-4
                )


# --- run folders --------------------------------------------------------------------------------


@pytest.fixture
def run_dir(tmp_path: Path, folders: dict[str, Path], model: Interlingua) -> Path:
    """The folder of a run that trained for no step."""
    run = tmp_path / "tiny"
    model.save_pretrained(run / "model")
    (run / "config.json").write_text(json.dumps(to_json(make_config(folders, model))))
    return run


def test_a_run_is_evaluated_into_its_folder(run_dir: Path) -> None:
    result = evaluate_run(run_dir, progress=False)
    held_out = make_examples(6, seed=99, facts=2)
    metrics = json.loads((run_dir / "eval" / "metrics.json").read_text())
    assert metrics == result
    assert set(metrics) == {
        *(
            "schema_version",
            "run",
            "examples",
            "contexts",
            "latent",
            "bytes",
            "readers",
            "collapse",
        ),
        *("latent_minus", "joint", "hypotheses", "coded_text"),
    }
    assert metrics["schema_version"] == 1
    assert set(metrics["run"]) == RUN_KEYS
    assert (metrics["run"]["name"], metrics["run"]["mode"]) == ("tiny", "context")
    check_metrics(metrics, examples=6)
    lines = (run_dir / "eval" / "predictions.jsonl").read_text().splitlines()
    check_records([json.loads(line) for line in lines], held_out)
    for name in ("metrics.csv", "report.html", "report.md"):
        assert (run_dir / "eval" / name).stat().st_size > 0
    assert list((run_dir / "eval" / "figures").glob("*.png"))
    assert "llama" in (run_dir / "model" / "README.md").read_text()


@pytest.mark.gpu
def test_a_run_is_evaluated_on_the_gpu(run_dir: Path) -> None:
    expected, result = (
        evaluate_run(run_dir, progress=False, device=torch.device(name)) for name in ("cpu", "cuda")
    )
    assert expected["run"]["device"].startswith("cpu")
    assert result["run"]["device"] == torch.cuda.get_device_name(0)
    for name, methods in expected["readers"].items():
        for method in METHODS:
            nll = result["readers"][name][method]["nll_per_token"]["mean"]
            assert nll == pytest.approx(methods[method]["nll_per_token"]["mean"], rel=1e-3)


def test_a_stored_report_is_good_for_its_configuration_and_code_only(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = run_dir / "eval" / "metrics.json"
    path.unlink(missing_ok=True)
    assert stored_metrics(run_dir) is None
    result = evaluate_run(run_dir, progress=False)
    assert stored_metrics(run_dir) == result
    monkeypatch.setattr("latentwire_fast.evaluation.pipeline.commit", lambda: "another")
    assert stored_metrics(run_dir) is None
    monkeypatch.undo()
    for broken in ("", "[]", "{}", json.dumps({**result, "run": {"name": "old"}})):
        path.write_text(broken)
        assert stored_metrics(run_dir) is None
    result["run"]["config_sha256"] = "0" * 64
    path.write_text(json.dumps(result))
    assert stored_metrics(run_dir) is None


def test_fresh_examples_are_scored_into_a_file_of_their_own(run_dir: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    out = tmp_path / "fresh.json"
    result = evaluate_run(run_dir, fresh_seed=7, count=3, out=out, progress=False)
    metrics = json.loads(out.read_text())
    assert metrics == result
    check_metrics(metrics, examples=3)
    texts = [e.context for e in make_examples(3, seed=7, facts=2)]
    assert metrics["run"]["eval_seed"] == 7
    assert metrics["bytes"]["text_utf8_mean"] == sum(map(len, texts)) / 3
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("nowhere/m.json", "nowhere is no folder"),
        ("tiny", "tiny: it is no file"),
        ("pipe", "pipe: it is no file"),
        ("tiny/eval/metrics.json", "belongs to the run; choose another name"),
        ("tiny/config.json", "belongs to the run"),
        ("tiny/model/README.md", "belongs to the run"),
        ("link/predictions.jsonl", "belongs to the run"),
    ],
)
def test_metrics_that_could_not_be_written_are_not_computed(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str, message: str
) -> None:
    os.mkfifo(tmp_path / "pipe")
    (run_dir / "eval").mkdir()
    (tmp_path / "link").symlink_to(run_dir / "eval")
    monkeypatch.setattr(Evaluator, "run", lambda self: pytest.fail("evaluated"))
    with pytest.raises(ConfigError, match=message):
        evaluate_run(run_dir, out=tmp_path / out)
    assert (tmp_path / "pipe").is_fifo()
    assert list((run_dir / "eval").iterdir()) == []


@pytest.mark.parametrize("link", [False, True], ids=["file", "dangling link"])
def test_no_report_goes_where_something_else_is(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, link: bool
) -> None:
    place = run_dir / "eval"
    place.symlink_to("nowhere") if link else place.write_text("mine")
    monkeypatch.setattr(Evaluator, "run", lambda self: pytest.fail("evaluated"))
    with pytest.raises(ConfigError, match="eval is no folder, the report goes there; move it away"):
        evaluate_run(run_dir)
    assert place.is_symlink() if link else place.read_text() == "mine"


def test_answers_that_tokenise_differently_are_not_scored(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PromptBuilder, "check_alignment", lambda self, answers: answers[:1])
    monkeypatch.setattr(Evaluator, "run", lambda self: pytest.fail("evaluated"))
    with pytest.raises(ConfigError, match=r"1 of \d answers of testbed \(held out\), such as"):
        evaluate_run(run_dir, progress=False)


def test_an_untrained_folder_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no trained model; train it first"):
        evaluate_run(tmp_path)


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        (None, {"mode": "pure"}),
        ("encoder", {"latents": 9}),
        ("encoder", {"width": 32}),
        ("bottleneck", {"bits": 4}),
        (None, {"attachments": [{"kind": "soft", "gain": 2.0}]}),
    ],
)
def test_a_configuration_that_is_not_the_models_is_refused(
    run_dir: Path, part: str | None, changes: dict[str, Any]
) -> None:
    """The metrics would name a shape, and count bytes, that nobody measured."""
    path = run_dir / "config.json"
    config = json.loads(path.read_text())
    (config if part is None else config[part]).update(changes)
    path.write_text(json.dumps(config))
    name = part or next(iter(changes))
    with pytest.raises(CheckpointError, match=rf"not of the model beside it \(differs in {name}\)"):
        evaluate_run(run_dir, progress=False)
    assert not (run_dir / "eval").exists()


def test_a_reader_with_other_weights_is_refused(
    run_dir: Path,
    folders: dict[str, Path],
    model: Interlingua,
    llama_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    other = tmp_path / "other"
    tiny_model("llama", llama_tokenizer, seed=1).save_pretrained(other)
    llama_tokenizer.save_pretrained(other)
    config = make_config({**folders, "llama": other}, model)
    (run_dir / "config.json").write_text(json.dumps(to_json(config)))
    with pytest.raises(CheckpointError, match="has other weights"):
        evaluate_run(run_dir, progress=False)
    assert not (run_dir / "eval").exists()


def test_a_reader_without_an_adapter_is_refused(
    folders: dict[str, Path],
    model: Interlingua,
    readers: dict[str, Reader],
    examples: list[Example],
) -> None:
    stranger = Reader.load(folders["qwen"], name="stranger")
    with pytest.raises(ConfigError, match="no adapter for reader 'stranger'"):
        Evaluator(
            make_config(folders, model), model, {"stranger": stranger}, examples, progress=False
        )
