"""Readers in 4 bits, on the CPU: trained with, evaluated, and answering from a payload."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from latentwire_fast.config.presets import weighted
from latentwire_fast.config.schema import StageConfig
from latentwire_fast.evaluation.pipeline import evaluate_run
from latentwire_fast.files.run_folder import RunFolder
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.prompts.builder import Turn
from latentwire_fast.readers.reader import load_readers
from latentwire_fast.serving import Receiver
from runs import deep, soft, tiny_config, train

pytestmark = pytest.mark.usefixtures("on_the_cpu")


def test_a_run_with_a_4_bit_reader(llama_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    config = tiny_config(
        llama_folder,
        attachments=(soft(expansion=1), deep(width=16)),
        data={"eval_examples": 4},
        evaluation={"bits": (6,), "timing_examples": 1, "resamples": 20},
        stages=(StageConfig("answer", steps=2, objectives=weighted(answer=1.0, kd=0.5)),),
    )
    readers = {
        name: dataclasses.replace(reader, load_in_4bit=True)
        for name, reader in config.readers.items()
    }
    config = dataclasses.replace(config, readers=readers)
    train(config, tmp_path / "run")
    metrics = evaluate_run(tmp_path / "run", progress=False)
    assert set(metrics["readers"]) == set(config.readers)

    model = Interlingua.from_pretrained(RunFolder(tmp_path / "run").model)
    payloads = model.encode_payloads(["Nulnak lives in Oslo.", "Bonk is 30."])
    for reader in load_readers(readers).values():
        receiver = Receiver.of(model, reader)  # knows it by its weights
        prompts = reader.prompts.build_many([Turn("Where?"), Turn("Who?")], latent="context")
        assert len(receiver.generate(prompts, payloads=payloads)) == 2
        answers = [Turn("Where?", "Oslo"), Turn("Who?", "Bonk")]
        scored = reader.prompts.build_many(answers, latent="context")
        assert receiver.score(scored, payloads=payloads).gold_N.isfinite().all()
