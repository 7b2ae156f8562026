"""Attachments in runs of two steps: trained, saved, loaded, received, resumed bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from latentwire_fast.config.presets import weighted
from latentwire_fast.config.schema import AttachmentConfig, RunConfig, StageConfig
from latentwire_fast.config.serialization import run_config_from_json, to_json
from latentwire_fast.errors import ConfigError
from latentwire_fast.evaluation.pipeline import evaluate_run
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.prompts.builder import Turn
from latentwire_fast.registry import ATTACHMENTS, ENCODERS, POOLERS
from latentwire_fast.serving import Receiver
from runs import assert_resumes, deep, tiny_config, train

pytestmark = pytest.mark.usefixtures("on_the_cpu")

CONTEXT = "Nulnak lives in Paris and is 94 years old."
SMALL: dict[str, Any] = {"width": 16, "heads": 2, "expansion": 1, "dropout": 0.1}
# Each with the positions that it takes of a reader beside the prompt's head; there are 4 latents.
PARTS: dict[str, tuple[AttachmentConfig, int]] = {
    "longer": (deep(length=7, layers=1, **SMALL), 7),
    "shorter, in place": (deep(length=2, layers=1, in_place=True, **SMALL), 2),
    "coprocessor": (ATTACHMENTS.config("coprocessor", layers=1, **SMALL), 4),
    "cross-attention": (ATTACHMENTS.config("cross_attention", **SMALL), 0),
    "learned base": (
        ATTACHMENTS.config("coprocessor", length=6, learned_base=True, layers=1, **SMALL),
        6,
    ),
}


def config_of(*folders: Path, attachment: AttachmentConfig, **changes: Any) -> RunConfig:
    """Two steps of answers, of quantised latents."""
    stage = StageConfig("s", steps=2, objectives=weighted(answer=1.0), quantize=6)
    return tiny_config(*folders, attachments=(attachment,), stages=(stage,), **changes)


@pytest.mark.parametrize("part", PARTS)
def test_a_part_is_trained_saved_loaded_and_resumed(
    part: str, llama_folder: Path, tmp_path: Path
) -> None:
    attachment, positions = PARTS[part]
    config = config_of(llama_folder, attachment=attachment)
    assert run_config_from_json(to_json(config)) == config
    whole = train(config, tmp_path / "whole")
    assert_resumes(config, tmp_path / "cut", whole)
    model = Interlingua.from_pretrained(whole.folder.model)
    assert model.positions == positions
    trained = whole.session.model.trained_state()
    assert all(torch.equal(value, trained[name]) for name, value in model.trained_state().items())
    payloads = model.encode_payloads([CONTEXT, "Kel is 7 years old."])
    for reader in whole.session.readers.values():
        turns = [Turn("Where does Nulnak live?", "Paris"), Turn("How old is Kel?", "7")]
        prompts = [reader.prompts.build([t], context="", latent=model.mode) for t in turns]
        inputs = whole.session.model.eval().reader_inputs(
            reader.name, model.decode_payloads(payloads)
        )
        with torch.no_grad():
            wanted = reader.score(prompts, **inputs).gold_N
        receiver = Receiver.of(model, reader)
        found = receiver.score(prompts, payloads=payloads).gold_N
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        questions = reader.prompts.build_many([Turn(t.question) for t in turns], latent=model.mode)
        together = receiver.generate(questions, payloads=payloads)
        alone = [
            receiver.generate([question], payloads=[payload])[0]
            for question, payload in zip(questions, payloads, strict=True)
        ]
        assert together == alone


def test_an_evaluation_of_cross_attention_alone(llama_folder: Path, tmp_path: Path) -> None:
    """It takes no positions of the reader, and is compared with text of one for each latent."""
    config = config_of(
        llama_folder,
        attachment=PARTS["cross-attention"][0],
        evaluation={"timing_examples": 1, "resamples": 5, "bits": (6,), "batch_size": 4},
        data={"eval_examples": 4},
    )
    train(config, tmp_path / "run")
    metrics = evaluate_run(tmp_path / "run", out=tmp_path / "metrics.json", progress=False)
    scores = metrics["readers"]["llama"]
    assert scores["latent"]["prefix_positions_mean"] == 4
    assert scores["token_budget"]["prefix_positions_mean"] <= 4


def test_parts_check_themselves(llama_folder: Path) -> None:
    with pytest.raises(ConfigError, match="length=0, expected at least 1"):
        deep(length=0)
    with pytest.raises(ConfigError, match="'coprocessor': in_place=False, expected True"):
        ATTACHMENTS.config("coprocessor", in_place=False)
    with pytest.raises(ConfigError, match="'coprocessor': text is empty"):
        ATTACHMENTS.config("coprocessor", text=" ")
    with pytest.raises(ConfigError, match=r"layers=\(1, 1\), expected different numbers from 0"):
        ATTACHMENTS.config("cross_attention", layers=(1, 1))
    with pytest.raises(ConfigError, match="width=10 does not divide among heads=4"):
        ATTACHMENTS.config("cross_attention", width=10)
    both = (deep(), ATTACHMENTS.config("coprocessor"))
    with pytest.raises(ConfigError, match=r"deep \('deep' and 'coprocessor' do\); keep one"):
        tiny_config(llama_folder, attachments=both)
    selected = ENCODERS.config(
        "lm", source=str(llama_folder), latents=4, d_z=8, pooler=POOLERS.config("selected")
    )
    stage = StageConfig("s", steps=1, objectives=weighted(select=1.0, kv=1.0))
    with pytest.raises(ConfigError, match="one position per latent, and attachment 'deep' has le"):
        tiny_config(llama_folder, encoder=selected, attachments=(deep(length=3),), stages=(stage,))
