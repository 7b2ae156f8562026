"""Validation while a run trains: what is scored, what it leaves alone (C3), what it decides."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import case_two_processes

from crashes import InScript
from latentwire_fast.config.schema import RunConfig, StageConfig, ValidationConfig
from latentwire_fast.data.examples import Example
from latentwire_fast.data.sources import heldout_examples, split_validation
from latentwire_fast.errors import CheckpointError, ConfigError, DataError, RunStopped
from latentwire_fast.evaluate import evaluate
from latentwire_fast.evaluation.evaluator import Evaluator
from latentwire_fast.evaluation.method_result import mean
from latentwire_fast.evaluation.pipeline import evaluate_run
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.readers.reader import load_readers
from latentwire_fast.training import validation
from latentwire_fast.training.builders import build_stream, validation_examples
from latentwire_fast.training.trainer import Trainer
from latentwire_fast.training.validation import Validator
from runs import (
    changed,
    model_digest,
    records,
    soft,
    store,
    tiny_config,
    tiny_squad,
    train,
    training_state,
)

pytestmark = pytest.mark.usefixtures("on_the_cpu")


@pytest.fixture(scope="module")
def config(
    llama_folder: Path, qwen_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> RunConfig:
    """Every second step on a slice of a file, in two batches."""
    data = tiny_squad(tmp_path_factory.mktemp("data") / "data.json", passages=14)
    return tiny_config(
        llama_folder,
        qwen_folder,
        data={"source": str(data), "eval_examples": 2},
        validation=ValidationConfig(every=2, examples=3, ema=0.5),
        evaluation={"batch_size": 2, "timing_examples": 1, "resamples": 50},
    )


@pytest.fixture(scope="module")
def plain(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """One undisturbed run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        return train(config, tmp_path_factory.mktemp("runs") / "plain")


def summary(run_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_dir / "validation.json").read_text())
    return found


def validator(**settings: Any) -> Validator:
    settings = {"every": 2, **settings}
    return Validator(ValidationConfig(**settings), [], dict, batch_size=2, modules=[])


def history(of: Validator, *values: float) -> list[dict[str, Any]]:
    """The entries of validations with these values of one reader."""
    done: list[dict[str, Any]] = []
    for step, value in enumerate(values):
        done.append(of.judge(step, {"llama": {"nll": value, "f1": value}}, done))
    return done


# --- the slice ------------------------------------------------------------------------------------


def test_the_slice_is_neither_trained_on_nor_evaluated_on(config: RunConfig) -> None:
    readers = load_readers(config.readers)
    chosen = validation_examples(config)
    trained = build_stream(config, readers).items  # type: ignore[attr-defined]
    contexts = {e.context for e in chosen}
    assert len(chosen) == 3
    assert not contexts & {item.context for item in trained}
    assert not contexts & {e.context for e in heldout_examples(config.data)}
    without = build_stream(changed(config, validation=None), readers).items  # type: ignore[attr-defined]
    assert {i.context for i in without} == contexts | {i.context for i in trained}
    assert validation_examples(changed(config, seed=5)) != []
    assert {e.id for e in validation_examples(changed(config, seed=5))} == {e.id for e in chosen}


def test_the_testbeds_slice_has_a_seed_of_its_own(config: RunConfig) -> None:
    config = changed(config, data={"source": "testbed"})
    chosen = validation_examples(config)
    assert len(chosen) == 3
    evaluated = heldout_examples(config.data, count=200)
    assert not {e.context for e in chosen} & {e.context for e in evaluated}
    assert chosen == validation_examples(changed(config, seed=3))


def test_a_slice_that_is_most_of_the_data_is_refused() -> None:
    examples = [Example(str(i), f"context {i // 2}", "?", ("a",)) for i in range(8)]
    rest, chosen = split_validation(examples, 3)
    assert [len(rest), len(chosen)] == [4, 3]
    with pytest.raises(DataError, match=r"5 examples would take 3 of 4 .* validation.examples"):
        split_validation(examples, 5)


# --- what is scored -------------------------------------------------------------------------------


def test_the_scores_are_those_of_the_evaluation(config: RunConfig, plain: Trainer) -> None:
    """Through payloads at the run's bits, by the one receiver: the last ones are of the model."""
    model = Interlingua.from_pretrained(plain.folder.model)
    examples = validation_examples(config)
    evaluator = Evaluator(config, model, load_readers(config.readers), examples, progress=False)
    evaluator.methods = {"latent": evaluator.methods["latent"]}
    results = evaluator.run()
    last = summary(plain.folder.path)["last"]
    assert last["step"] == 6
    assert set(last["scores"]) == set(config.readers)
    for name, scores in last["scores"].items():
        latent = results.readers[name].methods["latent"]
        assert scores["nll"] == pytest.approx(sum(latent.nll) / sum(latent.tokens), rel=1e-5)
        assert scores["f1"] == pytest.approx(mean(latent.f1))


def test_every_validation_is_kept(plain: Trainer) -> None:
    found = summary(plain.folder.path)
    done = found["validations"]
    assert [entry["step"] for entry in done] == [2, 4, 6]
    assert [*done] == plain.session.state.validations
    values = [mean([s["nll"] for s in entry["scores"].values()]) for entry in done]
    assert [entry["value"] for entry in done] == pytest.approx(values)
    assert done[1]["smoothed"] == pytest.approx((values[0] + values[1]) / 2)
    assert found["best"] == min(done, key=lambda entry: entry["smoothed"])
    assert (found["examples"], found["metric"], found["model"]) == (3, "nll", "last")
    assert list((plain.folder.path / "tensorboard").iterdir())


def test_the_report_shows_the_last_and_the_best(plain: Trainer, tmp_path: Path) -> None:
    metrics = evaluate_run(plain.folder.path, count=1, progress=False)
    found = summary(plain.folder.path)
    assert metrics["validation"] == found
    text = plain.folder.report_text.read_text()
    assert "### Validation" in text
    for which, note in (("last", " (this report's model)"), ("best", "")):
        scores = found[which]["scores"]["llama"]
        assert f"| {which}{note} | {found[which]['step']} | {scores['nll']:.3f} |" in text
    assert "Validation</th><th>Step</th>" in plain.folder.report.read_text()
    out = tmp_path / "best.json"
    best = evaluate_run(plain.folder.path, count=1, progress=False, out=out, best=True)
    assert json.loads(out.read_text()) == best
    nll = [m["readers"]["llama"]["latent"]["nll_per_token"] for m in (best, metrics)]
    assert (nll[0] == nll[1]) == (found["best"]["step"] == 6)


def test_the_best_model_is_scored_to_a_file_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"best needs out \(--best needs --out FILE\)"):
        evaluate(tmp_path, best=True)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds no model_best; .* has `validation`"):
        evaluate(tmp_path, best=True, out=tmp_path / "best.json")


def test_validation_disturbs_nothing(config: RunConfig, tmp_path: Path) -> None:
    """Losses, weights and random numbers are those of a run without it, on the same data."""
    config = changed(config, data={"source": "testbed"})
    scored = train(config, tmp_path / "scored")
    bare = train(changed(config, validation=None), tmp_path / "bare")
    assert training_state(scored) == training_state(bare)
    assert records(tmp_path / "scored") == records(tmp_path / "bare")
    assert model_digest(tmp_path / "scored") == model_digest(tmp_path / "bare")
    assert all(module.training is False for module in scored.session.model.modules())
    assert not (tmp_path / "bare" / "validation.json").exists()


@pytest.mark.slow
def test_two_processes_share_the_slice(
    config: RunConfig, tmp_path: Path, in_script: InScript
) -> None:
    config = changed(
        config,
        stages=(StageConfig("answer", steps=2),),
        data={"source": "testbed"},
        attachments=(soft(expansion=1),),  # without dropout, which differs
    )
    store(config, tmp_path / "config.json")
    assert in_script(case_two_processes, tmp_path) == [0, 0]
    train(config, tmp_path / "one")
    two, one = (summary(tmp_path / name)["last"]["scores"] for name in ("two", "one"))
    for name, scores in one.items():
        assert two[name] == pytest.approx(scores, rel=1e-3)


# --- stopping and going on ------------------------------------------------------------------------


class Meddle:
    """Does something at the n-th time (from 0) that a reader is asked about a batch."""

    def __init__(self, patch: pytest.MonkeyPatch, act: Callable[[], object], *, at: int) -> None:
        judge, calls = validation.judge_prompts, 0

        def judged(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls - 1 == at:
                act()
            return judge(*args, **options)

        patch.setattr(validation, "judge_prompts", judged)


def crash() -> None:
    raise RuntimeError("crash")


def assert_the_same(trainer: Trainer, plain: Trainer) -> None:
    found, expected = trainer.folder.path, plain.folder.path
    assert training_state(trainer) == training_state(plain)
    assert trainer.session.state.validations == plain.session.state.validations
    assert records(found) == records(expected)
    assert model_digest(found) == model_digest(expected)
    for name in ("model_best/config.json", "validation.json"):
        assert (found / name).read_bytes() == (expected / name).read_bytes()
    assert not list(found.glob("model*.tmp"))


ASKED = 4  # two batches for each of two readers, per validation


@pytest.mark.parametrize("save_every", [1, 1000])
@pytest.mark.parametrize("at", [0, ASKED + 2], ids=["first", "second"])
def test_a_crash_in_a_validation_costs_nothing(
    config: RunConfig, plain: Trainer, tmp_path: Path, at: int, save_every: int
) -> None:
    config = changed(config, save_every=save_every)
    with pytest.MonkeyPatch.context() as patch:
        Meddle(patch, crash, at=at)
        with pytest.raises(RuntimeError, match="crash"):
            train(config, tmp_path)
    assert_the_same(train(config, tmp_path, process=1), plain)


@pytest.mark.parametrize("times", [1, 2], ids=["once", "twice"])
def test_a_signal_in_a_validation(
    config: RunConfig, plain: Trainer, tmp_path: Path, times: int
) -> None:
    """One leaves off and saves the step, and the validation is done when the run goes on. A second
    one interrupts at once."""
    config = changed(config, save_every=1000)

    def act() -> None:
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        Meddle(patch, act, at=ASKED + 1)
        with pytest.raises(RunStopped if times == 1 else KeyboardInterrupt):
            train(config, tmp_path)
    assert (tmp_path / "checkpoints" / "step-00000004").exists() == (times == 1)
    assert [entry["step"] for entry in summary(tmp_path)["validations"]] == [2]
    assert_the_same(train(config, tmp_path, process=1), plain)


def test_a_crash_while_the_best_model_is_saved(
    config: RunConfig, plain: Trainer, tmp_path: Path
) -> None:
    save = Interlingua.save_pretrained

    def crashing(model: Interlingua, folder: Path) -> Path:
        save(model, folder)
        raise RuntimeError("crash")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Interlingua, "save_pretrained", crashing)
        with pytest.raises(RuntimeError, match="crash"):
            train(config, tmp_path)
    assert not (tmp_path / "model_best").exists()
    assert_the_same(train(config, tmp_path, process=1), plain)


# --- what the scores decide -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "ema", "values", "best"),
    [
        ("nll", 0.0, (3.0, 1.0, 2.0), 1),
        ("nll", 0.0, (3.0, 1.0, 1.0), 1),
        ("f1", 0.0, (0.1, 0.3, 0.2), 1),
        ("nll", 0.9, (3.0, 1.0, 2.9), 1),
        ("nll", 0.5, (3.0, 0.0, 1.0, 1.0), 3),  # not the lucky one
    ],
)
def test_the_best_step(metric: str, ema: float, values: tuple[float, ...], best: int) -> None:
    of = validator(metric=metric, ema=ema)
    done = history(of, *values)
    found = of.best(done)
    assert found is not None
    assert found["step"] == best


def test_nothing_is_best_before_the_first() -> None:
    assert validator().best([]) is None
    assert not validator(patience=1).has_stalled([])


def test_patience() -> None:
    of = validator(ema=0.0, patience=2)
    values = (3.0, 2.0, 2.5, 2.5)
    assert [of.has_stalled(history(of, *values[:n])) for n in range(5)] == [*[False] * 4, True]
    assert not validator(ema=0.0).has_stalled(history(of, *values))


def test_validation_is_due_once() -> None:
    of = validator(every=2)
    assert [of.is_due(step, [], last=False) for step in range(5)] == [
        False,
        False,
        True,
        False,
        True,
    ]
    assert of.is_due(3, [], last=True)
    assert not of.is_due(4, [{"step": 4}], last=True)


@pytest.mark.parametrize(
    "wrong", [{"every": 0}, {"examples": 0}, {"ema": 1.0}, {"patience": 0}, {"metric": "em"}]
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ConfigError, match=f"{name}="):
        ValidationConfig(**wrong)


@pytest.mark.parametrize("use_best", [False, True])
def test_training_ends_early_and_the_best_model_is_kept(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use_best: bool
) -> None:
    """The first validation is made the best: the run ends two later, at step 3, and again so when
    its end is done again."""
    settings = ValidationConfig(every=1, examples=1, ema=0.0, patience=2, use_best=use_best)
    config = changed(config, validation=settings, data={"source": "testbed"}, save_every=1000)
    nll = iter([1.0, 2.0, 2.0])
    monkeypatch.setattr(Validator, "run", lambda *_, **__: {"llama": {"nll": next(nll), "f1": 0.0}})
    finish = Trainer._finish
    monkeypatch.setattr(Trainer, "_finish", lambda self: crash())
    with contextlib.suppress(RuntimeError):
        train(config, tmp_path)
    assert len(records(tmp_path)) == 1 + 2
    monkeypatch.setattr(Trainer, "_finish", finish)
    trainer = train(config, tmp_path)
    assert trainer.finished
    assert trainer.session.state.step == 3
    found = summary(tmp_path)
    assert (found["stopped_early"], found["best"]["step"], found["last"]["step"]) == (True, 1, 3)
    is_best = (
        model_digest(tmp_path)
        == json.loads((tmp_path / "model_best" / "config.json").read_text())["sha256"]
    )
    assert is_best == use_best
    best = Interlingua.from_pretrained(tmp_path / "model_best")
    moved = [
        not torch.equal(a, b)
        for a, b in zip(best.parameters(), trainer.session.model.parameters(), strict=True)
    ]
    assert any(moved)
