"""Readers with low-rank updates in a run: C3, N3, what reads with the updates off, the report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import assert_same_losses, case_two_processes

from crashes import InScript
from latentwire_fast.config.schema import LoraSettings, RunConfig, StageConfig
from latentwire_fast.config.serialization import run_config_from_json, to_json
from latentwire_fast.evaluation.console import summary_lines
from latentwire_fast.evaluation.pipeline import evaluate_run
from latentwire_fast.models.encoders.lm import LMEncoder
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.objectives.micro_batch import EncodedBatch, ReaderBatch
from latentwire_fast.prompts.builder import Turn
from latentwire_fast.readers.reader import Reader, load_readers
from latentwire_fast.readers.trace import observe
from latentwire_fast.training.builders import build_model
from latentwire_fast.training.optimizers import build_optimizers
from latentwire_fast.training.trainer import Trainer
from readers import LORA_METHODS
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

pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("on_the_cpu")


def with_lora(config: RunConfig, *names: str, **settings: Any) -> RunConfig:
    """The configuration with low-rank updates of these readers, or of all."""
    lora = LoraSettings(**{"rank": 2, "lr": 1.0, **settings})
    readers = {
        name: replace(reader, lora=lora) if name in (names or config.readers) else reader
        for name, reader in config.readers.items()
    }
    return replace(config, readers=readers)


@pytest.fixture(scope="module")
def config(
    llama_folder: Path, qwen_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> RunConfig:
    """Both readers with dropout in their updates, on a file: KD has a cache."""
    data = tiny_squad(tmp_path_factory.mktemp("data") / "data.json", passages=12)
    config = tiny_config(llama_folder, qwen_folder, data={"source": str(data)})
    return with_lora(config, dropout=0.2)


@pytest.fixture(scope="module")
def plain(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """One undisturbed run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        return train(config, tmp_path_factory.mktemp("runs") / "plain")


def test_the_updates_are_trained_and_the_weights_are_not(config: RunConfig, plain: Trainer) -> None:
    """N3 for a reader that is not frozen as a whole."""
    session = plain.session
    for name, reader in session.readers.items():
        fresh = Reader.from_config(name, config.readers[name])
        assert reader.weights_digest() == fresh.fingerprint == reader.fingerprint
        lora = session.model.lora_of(name)
        assert lora is not None
        assert all(parts["B"].weight.any() for parts in lora.layers.values())
    names = [name for name, _ in session.state.named if name.startswith("lora.")]
    assert len(names) == 2 * sum(len(lora.layers) for lora in session.model.lora.values())
    assert json.loads((plain.folder.model / "config.json").read_text())["lora"] == [
        *("llama", "qwen2")
    ]


def test_configurations_with_updates_are_json(config: RunConfig) -> None:
    assert run_config_from_json(json.loads(json.dumps(to_json(config)))) == config


@pytest.mark.parametrize("checkpointing", [False, True])
def test_resuming_is_bit_exact_with_dropout_in_the_updates(
    config: RunConfig, plain: Trainer, tmp_path: Path, checkpointing: bool
) -> None:
    """C3; recomputed activations draw the same dropout, so they change nothing."""
    config = changed(config, save_every=1)
    if checkpointing:
        config = changed(config, optim={"gradient_checkpointing": True})
    trainer = Trainer(config, tmp_path, progress=False)
    step = trainer._train_step

    def crashing() -> Any:
        if trainer.session.state.step == 3:
            raise RuntimeError("crash")
        return step()

    trainer._train_step = crashing  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="crash"):
        trainer.run()
    again = train(config, tmp_path, process=1)
    assert training_state(again) == training_state(plain)
    assert records(tmp_path) == records(plain.folder.path)
    assert model_digest(tmp_path) == model_digest(plain.folder.path)


def test_readers_in_sequence_and_in_turn(config: RunConfig, tmp_path: Path) -> None:
    stages = (StageConfig("answer", steps=3),)
    config = with_lora(
        changed(config, stages=stages, attachments=(soft(expansion=1),), optim={"muon_lr": None})
    )
    train(config, tmp_path / "sum")
    train(changed(config, optim={"readers": "sequential"}), tmp_path / "sequential")
    assert_same_losses(records(tmp_path / "sequential"), records(tmp_path / "sum"))
    config = changed(config, optim={"readers": "alternate"}, stages=(StageConfig("a", steps=1),))
    model = train(config, tmp_path / "alternate").session.model
    moved = {
        name: any(parts["B"].weight.any() for parts in lora.layers.values())
        for name, lora in model.lora.items()
    }
    assert moved == {"llama": True, "qwen2": False}


@pytest.mark.slow
def test_two_processes_sum_the_gradients_of_the_updates(
    config: RunConfig, tmp_path: Path, in_script: InScript
) -> None:
    config = with_lora(changed(config, attachments=(soft(expansion=1),)))
    train(config, tmp_path / "one")
    store(config, tmp_path / "config.json")
    assert in_script(case_two_processes, tmp_path) == [0, 0]
    assert_same_losses(records(tmp_path / "two"), records(tmp_path / "one"))


def test_the_rate_of_the_updates_is_a_factor_of_their_own(
    config: RunConfig, plain: Trainer
) -> None:
    """AdamW, whatever their size; no matrices for Muon."""
    config = with_lora(config, lr=0.25)
    model = build_model(config, load_readers(config.readers))
    lora = set(model.lora.parameters())
    groups = [g for o in build_optimizers(model, config.optim) for g in o.param_groups]
    rates = {g["base_lr"] for g in groups if lora & set(g["params"])}
    assert lora
    assert rates == {0.25 * config.optim.adamw_lr}


def test_an_encoder_never_shares_a_reader_that_changes(config: RunConfig) -> None:
    config = changed(config, encoder={"frozen": True})
    for run, shares in ((config, False), (with_lora(config, "qwen2"), False)):
        readers = load_readers(run.readers)
        model = build_model(run, readers)
        assert isinstance(model.encoder, LMEncoder)
        assert (model.encoder.core is readers["llama"].backbone) == shares
        assert not any(".lora_" in name for name, _ in model.encoder.named_parameters())
    bare = replace(config, readers={n: replace(r, lora=None) for n, r in config.readers.items()})
    readers = load_readers(bare.readers)
    assert build_model(bare, readers).encoder.core is readers["llama"].backbone  # type: ignore[union-attr]


def test_teachers_and_targets_are_of_the_reader_as_it_was(
    config: RunConfig, plain: Trainer
) -> None:
    """Hidden states of the text and what `select` and `kv` look at, of the trained session."""
    session, stage = plain.session, plain.session.config.stages[1]
    items = session.stream.batch(0, 2, facts=1)
    prepared = session.objectives.prepare(items, stage, ["llama"])
    reader = session.readers["llama"]
    bare = Reader.from_config("llama", config.readers["llama"])
    prompts = [item.prompts["text", "llama"] for item in prepared]
    expected_ND = bare.target_hidden(bare.collate(prompts))
    encoded = EncodedBatch(prepared, session.model, bits=None, select=False, cut=False)
    batch = ReaderBatch(encoded, reader, teacher=None)
    assert torch.equal(batch.teacher_hidden_ND, expected_ND)
    assert not torch.equal(reader.target_hidden(reader.collate(prompts)), expected_ND)
    assert torch.equal(batch.observation.attention_BT, observe(bare, prompts).attention_BT)


def test_the_evaluation_reads_text_without_the_updates_and_says_so(
    config: RunConfig, plain: Trainer
) -> None:
    metrics = evaluate_run(plain.folder.path, count=2, progress=False)
    model = Interlingua.from_pretrained(plain.folder.model)
    sizes = {
        name: sum(w.numel() for w in model.lora[name].weights().values()) for name in model.lora
    }
    assert {name: entry["parameters"] for name, entry in metrics["lora"].items()} == sizes
    for name, methods in metrics["readers"].items():
        assert set(LORA_METHODS) < set(methods)
        bare = Reader.from_config(name, config.readers[name])
        lines = plain.folder.predictions.read_text().splitlines()
        for line in map(json.loads, lines):
            turn = Turn(line["question"], line["answers"][0])
            prompt = bare.prompts.build([turn], context=line["context"])
            gold = bare.score([prompt]).gold_N.tolist()[:4]
            found = line["readers"][name]
            assert found["text"]["gold_logprobs"] == pytest.approx(gold, abs=1e-4)
            assert found["embedding_replay"]["gold_logprobs"] == pytest.approx(gold, abs=1e-4)
            assert found["text_lora"]["gold_logprobs"] != pytest.approx(gold, abs=1e-4)
    assert "llama is not a frozen reader: a LoRA of" in "\n".join(summary_lines(metrics))
    for page in (plain.folder.report_text, plain.folder.report, plain.folder.model_card):
        assert (
            f"is not a frozen reader: a LoRA of {sizes['llama']:,} parameters" in page.read_text()
        )
    assert "frozen readers" not in plain.folder.report_text.read_text()


def test_one_reader_with_updates_beside_one_without(config: RunConfig, tmp_path: Path) -> None:
    bare = {n: replace(r, lora=None) for n, r in config.readers.items()}
    config = with_lora(replace(config, readers=bare), "qwen2")
    config = replace(config, stages=(StageConfig("answer", steps=1),))
    train(config, tmp_path)
    metrics = evaluate_run(tmp_path, count=2, progress=False)
    assert [*metrics["lora"]] == ["qwen2"]
    assert not set(LORA_METHODS) & set(metrics["readers"]["llama"])
    assert set(LORA_METHODS) < set(metrics["readers"]["qwen2"])
    assert any(line.split()[-2:-1] == ["-"] for line in summary_lines(metrics))
