"""Updates trained on text: resumed bit for bit (C3), saved as a reader's source, scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from latentwire_fast.config.schema import ReaderConfig, RunConfig
from latentwire_fast.errors import ConfigError, RunStopped
from latentwire_fast.prompts.builder import Turn
from latentwire_fast.readers.reader import Reader
from latentwire_fast.train_text_lora import (
    TextLoraArguments,
    text_lora_config,
    train_text_lora,
)
from latentwire_fast.training.optimizer_state import rng_state
from latentwire_fast.training.text_lora import TextLoraTrainer
from runs import changed, new_process, records, tiny_squad
from test_entry_points import in_this_process

pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("on_the_cpu")


@pytest.fixture(scope="module")
def arguments(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    data = tiny_squad(tmp_path_factory.mktemp("data") / "data.json", passages=24)
    sizes = {"rank": 2, "steps": 6, "batch_size": 4, "lr": 0.02, "eval_examples": 1, "threads": 1}
    slice_ = {"validate_every": 3, "validation_examples": 3, "max_new_tokens": 3}
    return {"reader": str(llama_folder), "data": str(data), **sizes, **slice_, "dropout": 0.2}


def of(arguments: dict[str, Any], run: Path, **changes: Any) -> RunConfig:
    config = text_lora_config(TextLoraArguments(run=run, **{**arguments, **changes}))
    return changed(config, log_every=1)


def state(trainer: TextLoraTrainer) -> dict[str, Any]:
    weights = trainer.session.lora.weights()  # type: ignore[attr-defined]
    tensors, rest = rng_state({})
    return {
        "weights": {name: weight.tolist() for name, weight in weights.items()},
        "validations": trainer.session.state.validations,
        "rng": ({k: v.tolist() for k, v in tensors.items()}, rest),
    }


@pytest.fixture(scope="module")
def plain(arguments: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> TextLoraTrainer:
    """One undisturbed run."""
    run = tmp_path_factory.mktemp("runs") / "plain"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        new_process(0)
        trainer = TextLoraTrainer(of(arguments, run), run, progress=False)
        trainer.run()
    return trainer


def test_the_loss_falls_and_the_reader_stays(plain: TextLoraTrainer) -> None:
    lines = records(plain.folder.path)
    assert [line["step"] for line in lines] == list(range(6))
    assert set(lines[0]["losses"]) == {"text/reader"}
    assert lines[0]["losses"]["text/reader"] == lines[0]["loss"]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert [v["step"] for v in plain.session.state.validations] == [3, 6]
    reader = plain.session.readers["reader"]
    assert reader.weights_digest() == Reader.load(reader.source, name="x").fingerprint


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_resuming_is_bit_exact(
    arguments: dict[str, Any], plain: TextLoraTrainer, tmp_path: Path, micro_batch: int | None
) -> None:
    """By a signal in the middle; in micro-batches the losses are the same, without dropout."""
    if micro_batch:
        arguments = {**arguments, "dropout": 0.0}
    config = of(arguments, tmp_path, save_every=100)
    trainer = TextLoraTrainer(config, tmp_path, progress=False)
    step = trainer._train_step

    def stopping() -> Any:
        trainer.signals.number = 2 if trainer.session.state.step == 2 else None
        return step()

    trainer._train_step = stopping  # type: ignore[method-assign]
    new_process(0)
    with pytest.raises(RunStopped, match="after step 3 of 6"):
        trainer.run()
    new_process(1)
    again = TextLoraTrainer(config, tmp_path, progress=False)
    again.run()
    if micro_batch is None:
        assert state(again) == state(plain)
        assert records(tmp_path) == records(plain.folder.path)
    else:
        small = of(arguments, tmp_path, micro_batch=micro_batch)
        cut = TextLoraTrainer(small, tmp_path / "cut", progress=False)
        cut.run()
        for a, b in zip(records(tmp_path), records(tmp_path / "cut"), strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_what_it_makes_is_a_reader(plain: TextLoraTrainer) -> None:
    """Every command takes it; it reads as the reader did with the updates on."""
    made = Reader.load(plain.folder.model, name="made")
    trained = plain.session.readers["reader"]
    plain.session.lora.eval()  # type: ignore[attr-defined]
    prompt = made.prompts.build([Turn("Who?")], context="Nulnak is old.")
    batches = [reader.collate([prompt]) for reader in (made, trained)]
    hidden = [
        reader.backbone(**batch.model_inputs()).last_hidden_state
        for reader, batch in zip((made, trained), batches, strict=True)
    ]
    torch.testing.assert_close(hidden[0], hidden[1], atol=1e-4, rtol=1e-4)
    assert made.fingerprint != trained.fingerprint
    assert (plain.folder.best_model / "adapter_config.json").exists()


def test_the_command_prints_one_line_of_scores(arguments: dict[str, Any], tmp_path: Path) -> None:
    options = {"--rank": 2, "--steps": 2, "--batch-size": 2, "--eval-examples": 1, "--threads": 1}
    words = [str(word) for pair in options.items() for word in pair]
    words += ["--reader", arguments["reader"], "--data", arguments["data"], "--run", str(tmp_path)]
    printed = []
    for _ in range(2):  # the second time nothing is trained or scored again
        status, output, errors = in_this_process("train_text_lora", *words, "--device", "cpu")
        assert status == 0, errors
        (line,) = output.splitlines()
        printed.append(json.loads(line))
    found = printed[0]
    assert printed == [found, json.loads((tmp_path / "scores.json").read_text())]
    assert found["reader"] == str(tmp_path / "reader")
    assert (found["examples"], found["steps"]) == (1, 2)
    for scores in (found["before"], found["after"]):
        assert set(scores) == {"f1", "em", "nll_per_token"}
        assert scores["nll_per_token"]["low"] <= scores["nll_per_token"]["mean"]


def test_scores_before_are_those_of_the_reader_itself(
    arguments: dict[str, Any], tmp_path: Path
) -> None:
    config = of(arguments, tmp_path, steps=1)
    scores = train_text_lora(config, tmp_path, progress=False)
    assert scores is not None
    assert scores["before"] != scores["after"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validate_every": None, "use_best": True}, "need --validate-every STEPS"),
        ({"validate_every": None, "patience": 2}, "need --validate-every STEPS"),
        ({"rank": 0}, "rank=0, expected at least 1"),
        ({"lr": 0.0}, "adamw_lr=0.0, expected above 0"),
    ],
)
def test_wrong_options_are_one_line(
    arguments: dict[str, Any], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        of(arguments, tmp_path, **changes)


def test_a_configuration_without_one_reader_to_train_is_refused(
    arguments: dict[str, Any], tmp_path: Path
) -> None:
    bare = {"reader": ReaderConfig(arguments["reader"])}
    config = changed(of(arguments, tmp_path), readers=bare)
    with pytest.raises(ConfigError, match="for one reader with `lora` settings"):
        TextLoraTrainer(config, tmp_path, progress=False).run()
    assert not (tmp_path / "config.json").exists()
