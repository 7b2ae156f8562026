"""Runs with every bottleneck: stopped and gone on with, saved and loaded, received, evaluated."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from latentwire_fast.config.overrides import with_overrides
from latentwire_fast.config.presets import weighted
from latentwire_fast.config.schema import RunConfig, StageConfig, ValidationConfig
from latentwire_fast.config.serialization import read_run_config
from latentwire_fast.errors import ConfigError, PayloadError
from latentwire_fast.evaluation.pipeline import evaluate_run
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.objectives.objective_set import ObjectiveSet
from latentwire_fast.prompts.builder import Turn
from latentwire_fast.readers.reader import load_readers
from latentwire_fast.registry import BOTTLENECKS
from latentwire_fast.serving import Receiver
from latentwire_fast.training.bottleneck_fit import fit_bottleneck
from runs import assert_same_run, records, tiny_config, tiny_squad, train
from test_entry_points import in_this_process

pytestmark = pytest.mark.usefixtures("on_the_cpu")

TEXT = "Nulnak is already 94 years old."
SMALL = {"prior": "static", "prior_texts": 60}
BOTTLENECK: dict[str, dict[str, Any]] = {
    "uniform": {"version": 2, "bits": 3, **SMALL},
    "fsq": {"levels": (8, 5), "running_prior": True, **SMALL},
    "vq": {"bits": 4, "update": "gradient", "passing": "rotation", **SMALL},
    "vq ema": {"bits": 4, "update": "ema", **SMALL},
    "residual_vq": {"bits": 10, "code_bits": 5, "stages": 3, **SMALL},
    "soft_codebook": {"version": 2, "codes": 8, **SMALL},
    "vq autoregressive": {
        **{"bits": 4, **SMALL, "prior": "autoregressive"},
        **{"prior_steps": 10, "prior_width": 8},
    },
}


def config_of(name: str, folder: Path, **changes: Any) -> RunConfig:
    """Four steps, of which the last two send latents."""
    bottleneck = BOTTLENECKS.config(name.split()[0], **BOTTLENECK[name])
    losses = weighted(answer=1.0)
    own = {"commitment": 1.0} if "vq" in name else {"rate": 1e-3} if name == "fsq" else {}
    sent = weighted(answer=1.0, **own)
    stages = (
        StageConfig("answer", steps=2, objectives=losses),
        StageConfig("quantized", steps=2, objectives=sent, quantize=bottleneck.bits),
    )
    settings = {"bottleneck": bottleneck, "stages": stages, "save_every": 1, "log_every": 1}
    return tiny_config(folder, **settings | changes)


class Crash(Exception):
    """What no part of the library expects."""


@pytest.mark.parametrize("name", BOTTLENECK)
def test_a_run_goes_on_bit_for_bit_and_its_model_says_the_same_anywhere(
    name: str, llama_folder: Path, tmp_path: Path
) -> None:
    config = config_of(name, llama_folder)
    plain = train(config, tmp_path / "plain")
    compute, calls = ObjectiveSet.compute, 0

    def crashing(objectives: ObjectiveSet, *args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise Crash
        return compute(objectives, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ObjectiveSet, "compute", crashing)
        with pytest.raises(Crash):
            train(config, tmp_path / "stopped")
    assert_same_run(train(config, tmp_path / "stopped", process=1), plain)

    trained = plain.session.model  # type: ignore[attr-defined]
    loaded = Interlingua.from_pretrained(tmp_path / "plain" / "model")
    payloads = loaded.encode_payloads([TEXT, "Zorb is 3 years old."])
    assert payloads == trained.encode_payloads([TEXT, "Zorb is 3 years old."])
    assert torch.equal(loaded.decode_payloads(payloads), trained.decode_payloads(payloads))
    _check_receiver(loaded, config, payloads)
    if name == "fsq":
        bits = records(tmp_path / "plain")[-1]["losses"][f"rate/{llama_folder.name}"]
        assert 30 < bits < 8 * config.encoder.latents * config.encoder.d_z
    if "vq" in name:
        last = records(tmp_path / "plain")[-1]
        assert last["losses"][f"commitment/{llama_folder.name}"] > 0
        assert 1 <= last["codes"]["0"]["perplexity"] <= 32


def _check_receiver(model: Interlingua, config: RunConfig, payloads: list[bytes]) -> None:
    """A receiver reads the payloads as the model does, and nothing else."""
    (reader,) = load_readers(config.readers, torch.device("cpu")).values()
    receiver = Receiver.of(model, reader)
    turns = [Turn("How old is Nulnak?", None)]
    prompts = [reader.prompts.build(turns, context=TEXT, latent="context")] * 2
    first = receiver.prefill(prompts, payloads=payloads)
    assert first.logits_BV.isfinite().all()
    with pytest.raises(PayloadError, match="payload 1: the CRC-32 is"):
        receiver.prefill(prompts, payloads=[payloads[0], payloads[1][:-1] + b"\x01\x02"])


def test_codes_are_told_from_those_of_another_model(llama_folder: Path, tmp_path: Path) -> None:
    """Two models with one encoder and different priors have different fingerprints."""
    model = train(config_of("vq", llama_folder), tmp_path / "run").session.model  # type: ignore[attr-defined]
    payloads = model.encode_payloads([TEXT])
    model.fit_bottleneck([torch.randn(9, 4, 8)])
    with pytest.raises(PayloadError, match="payload 0 was written by model 0x"):
        model.decode_payloads(payloads)


def test_an_added_reader_reads_a_trained_codebook(
    llama_folder: Path, qwen_folder: Path, tmp_path: Path
) -> None:
    config = config_of("vq ema", llama_folder)
    train(config, tmp_path / "base")
    own = with_overrides(config, base=str(tmp_path / "base"), readers={"added": str(qwen_folder)})
    train(own, tmp_path / "added")
    first, added = (
        Interlingua.from_pretrained(tmp_path / run / "model") for run in ("base", "added")
    )
    payloads = first.encode_payloads([TEXT])
    assert added.encode_payloads([TEXT]) == payloads
    assert torch.equal(added.decode_payloads(payloads), first.decode_payloads(payloads))


def test_the_best_model_of_the_validations_is_fitted_too(
    llama_folder: Path, tmp_path: Path
) -> None:
    config = config_of(
        "vq", llama_folder, validation=ValidationConfig(every=1, examples=4, use_best=True)
    )
    validated = train(config, tmp_path / "run").session.model  # type: ignore[attr-defined]
    best, final = (
        Interlingua.from_pretrained(tmp_path / "run" / name) for name in ("model_best", "model")
    )
    before, after = (m.bottleneck.format_tensors() for m in (best, final))
    assert torch.equal(before["codes_Kd"], after["codes_Kd"])
    assert not torch.equal(before["frequencies_S"], after["frequencies_S"])
    assert final.decode_payloads(final.encode_payloads([TEXT])).isfinite().all()
    # A validation reads the fingerprint of the model as it is then, not as it ends.
    validated.save_pretrained(tmp_path / "end")
    end = Interlingua.from_pretrained(tmp_path / "end")
    assert end.fingerprint == validated.fingerprint


def test_a_trained_run_gets_smaller_payloads_of_the_same_values(
    llama_folder: Path, tmp_path: Path
) -> None:
    config = tiny_config(llama_folder, stages=(StageConfig("answer", steps=1, quantize=6),))
    train(config, tmp_path / "run")
    words = ["--run", str(tmp_path / "run"), "--out", str(tmp_path / "small"), "--device", "cpu"]
    status, output, errors = in_this_process("repack", *words, "--texts", "60")
    assert status == 0, errors
    first, small = (
        Interlingua.from_pretrained(tmp_path / name / "model") for name in ("run", "small")
    )
    assert f"model {small.fingerprint:#06x}, 6 bits" in output
    payloads, smaller = (model.encode_payloads([TEXT]) for model in (first, small))
    assert len(smaller[0]) < len(payloads[0]) - 9
    assert torch.equal(small.decode_payloads(smaller), first.decode_payloads(payloads))
    assert torch.equal(small.decode_payloads(payloads), first.decode_payloads(payloads))
    assert evaluated_settings(tmp_path / "small") == small.bottleneck_config
    words[1], words[3] = str(tmp_path / "small"), str(tmp_path / "smaller")  # symbols of 4 bits
    status, output, errors = in_this_process("repack", *words, "--bits", "4", "--texts", "7")
    assert status == 0, errors
    assert "4 bits" in output
    status, _, errors = in_this_process("repack", *words)
    assert status == 2
    assert "holds something already; name a new folder" in errors


def evaluated_settings(run: Path) -> Any:
    """The bottleneck of a run's configuration, by which an evaluation checks the model."""
    return read_run_config(run).bottleneck


def test_a_text_of_a_finite_data_set_is_fitted_to_once(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """60 texts are wanted, and the data set has fewer: each is encoded once."""
    data = tiny_squad(tmp_path / "data.json", passages=7)
    trainer = train(config_of("uniform", llama_folder, data={"source": str(data)}), tmp_path / "a")
    encode, read = Interlingua.encode, []

    def watched(model: Interlingua, contexts: Sequence[str], *rest: Any) -> torch.Tensor:
        read.extend(contexts)
        return encode(model, contexts, *rest)

    monkeypatch.setattr(Interlingua, "encode", watched)
    session: Any = trainer.session
    fit_bottleneck(session.model, session.stream, session.config)
    assert sorted(read) == sorted({item.context for item in session.stream.items})


@pytest.mark.slow
def test_an_evaluation_scores_every_width_of_a_residual_codebook(
    llama_folder: Path, tmp_path: Path
) -> None:
    config = config_of(
        "residual_vq",
        llama_folder,
        data={"source": str(tiny_squad(tmp_path / "data.json", passages=20))},
    )
    train(config, tmp_path / "run")
    metrics = evaluate_run(tmp_path / "run", count=1, progress=False)
    assert list(metrics["bytes"]["payload_mean"]) == ["15", "10", "5"]
    assert metrics["latent"]["bits"] == 10
    assert (tmp_path / "run" / "eval" / "report.html").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"stages": (StageConfig("s", steps=1, quantize=4),)},
            "stage 's': bottleneck 'vq' needs the objective 'commitment'; add",
        ),
        (
            {"stages": (StageConfig("s", steps=1),)},
            "bottleneck 'vq' learns its codes in stages with `quantize`, and no stage has it; set",
        ),
        (
            {"stages": (StageConfig("s", steps=1, quantize=6),)},
            "stage 's': quantize=6, expected 4",
        ),
        (
            {
                "stages": (
                    StageConfig(
                        "s", steps=1, quantize=6, objectives=weighted(answer=1.0, commitment=1.0)
                    ),
                ),
                "bottleneck": BOTTLENECKS.config("uniform"),
            },
            "objective 'commitment' needs a bottleneck with a loss of its own",
        ),
        (
            {
                "stages": (
                    StageConfig("s", steps=1, objectives=weighted(answer=1.0, commitment=1.0)),
                )
            },
            "stage 's': objective 'commitment' is about the latents that are sent; set quantize=4",
        ),
        (
            {"stages": (StageConfig("s", steps=1, quantize=4, objectives=weighted(rate=1.0)),)},
            r"objective 'rate' needs a bottleneck with running_prior=True \(uniform of version 2",
        ),
    ],
)
def test_runs_that_cannot_learn_their_codes_are_named(
    changes: dict[str, Any], message: str, llama_folder: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of("vq", llama_folder, **changes)
