"""A reader added to a trained run: its encoder stays, its payloads are read by one more model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from latentwire_fast.config.overrides import with_overrides
from latentwire_fast.config.presets import load_preset, weighted
from latentwire_fast.config.schema import ReaderConfig, RunConfig, StageConfig
from latentwire_fast.errors import CheckpointError, ConfigError
from latentwire_fast.evaluation.pipeline import evaluate_run
from latentwire_fast.files.tensors import parameter_digest
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.registry import POOLERS
from runs import changed, deep, store, tiny_config, train, train_on_the_cpu

pytestmark = pytest.mark.usefixtures("on_the_cpu")

TEXT = "Nulnak is already 94 years old."
SELECTED = {
    "encoder": {"pooler": POOLERS.config("selected"), "frozen": True},
    "attachments": (deep(width=16, heads=2, expansion=1, dropout=0.1),),
    "stages": (
        StageConfig("select", steps=1, objectives=weighted(select=1.0)),
        StageConfig("both", steps=2, objectives=weighted(select=1.0, kv=1.0)),
        StageConfig("answer", steps=1),
    ),
}


@pytest.fixture(scope="module")
def base(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose encoder has seen one reader."""
    run_dir = tmp_path_factory.mktemp("runs") / "base"
    train_on_the_cpu(tiny_config(llama_folder), run_dir)
    return run_dir


@pytest.fixture
def config(base: Path, llama_folder: Path, qwen_folder: Path) -> RunConfig:
    """One that adds the other, by a preset with an encoder of its own."""
    own = tiny_config(llama_folder, encoder={"latents": 7}, bottleneck={"bits": 8})
    return with_overrides(own, base=str(base), readers={"added": str(qwen_folder)})


def test_a_base_brings_its_encoder_bottleneck_and_mode(
    config: RunConfig, llama_folder: Path, base: Path
) -> None:
    before = tiny_config(llama_folder)
    assert (config.encoder, config.bottleneck, config.mode) == (
        before.encoder,
        before.bottleneck,
        before.mode,
    )
    assert config.base == str(base)
    assert list(config.readers) == ["added"]


def test_an_added_reader_reads_the_payloads_that_are_out_there(
    config: RunConfig, base: Path, tmp_path: Path
) -> None:
    trainer = train(config, tmp_path / "added")
    assert {name.split(".")[0] for name, _ in trainer.session.state.named} == {
        "attachments",
        "task_tokens",
    }
    first = Interlingua.from_pretrained(base / "model")
    added = Interlingua.from_pretrained(tmp_path / "added" / "model")
    payloads = first.encode_payloads([TEXT])
    assert added.encode_payloads([TEXT]) == payloads
    latent = added.decode_payloads(payloads)
    assert added.prefix("added", latent).isfinite().all()
    fresh = parameter_digest(first.attachments["llama"].state_dict().items())
    assert parameter_digest(added.attachments["added"].state_dict().items()) != fresh
    with pytest.raises(ConfigError, match="no adapter for reader 'llama'"):
        added.prefix("llama", latent)


def test_an_added_reader_answers_h7(config: RunConfig, base: Path, tmp_path: Path) -> None:
    train(config, tmp_path / "added")
    found = evaluate_run(tmp_path / "added", progress=False)["hypotheses"]
    # These readers cannot read text either; what they could fail at is not said to pass.
    assert found["H7"]["verdict"] == "not measured"
    report = (tmp_path / "added" / "eval" / "report.md").read_text()
    assert f"encoder of {base}" in report.replace("`", "")


def test_the_encoder_learns_nothing_and_keeps_its_dropout_off(
    config: RunConfig, base: Path, tmp_path: Path
) -> None:
    trainer = train(config, tmp_path / "added")
    before = Interlingua.from_pretrained(base / "model").encoder.state_dict()
    assert parameter_digest(trainer.session.model.encoder.state_dict().items()) == parameter_digest(
        before.items()
    )
    lines = (tmp_path / "added" / "diagnostics.jsonl").read_text().splitlines()
    assert {json.loads(line)["grad_norms"]["encoder"] for line in lines} == {0.0}


def test_positions_that_are_chosen_stay_and_their_keys_are_learned(
    llama_folder: Path, qwen_folder: Path, tmp_path: Path
) -> None:
    train(tiny_config(llama_folder, **SELECTED), tmp_path / "base")
    config = with_overrides(
        tiny_config(llama_folder, **SELECTED),
        base=str(tmp_path / "base"),
        readers={"added": str(qwen_folder)},
    )
    assert [(s.name, s.objectives) for s in config.stages] == [
        ("both", weighted(kv=1.0)),
        ("answer", weighted(answer=1.0)),
    ]
    train(config, tmp_path / "added")
    lines = (tmp_path / "added" / "diagnostics.jsonl").read_text().splitlines()
    losses = [set(json.loads(line)["losses"]) for line in lines]
    assert losses == [{"kv/added"}, {"kv/added"}, {"answer/added"}]
    models = [Interlingua.from_pretrained(tmp_path / n / "model") for n in ("base", "added")]
    assert models[0].encode_payloads([TEXT]) == models[1].encode_payloads([TEXT])


def test_the_base_is_found_from_anywhere(
    config: RunConfig, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(base.parent)
    train(changed(config, base=base.name), tmp_path / "added")
    stored = json.loads((tmp_path / "added" / "config.json").read_text())
    assert stored["base"] == str(base)


def test_a_configuration_file_may_name_its_base(config: RunConfig, tmp_path: Path) -> None:
    loaded = load_preset(str(store(config, tmp_path / "added.json")))
    assert with_overrides(loaded) == config


# --- what is refused ----------------------------------------------------------------------------


def test_readers_that_the_encoder_has_learned_with_are_not_added(
    base: Path, llama_folder: Path, tmp_path: Path
) -> None:
    config = with_overrides(
        tiny_config(llama_folder), base=str(base), readers={"again": str(llama_folder)}
    )
    with pytest.raises(ConfigError, match=r"learned with reader 'again' \('llama' there\).*--read"):
        train(config, tmp_path)
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("given", [{"encoder": "testbed:qwen"}, {"mode": "pure"}])
def test_another_encoder_or_mode_beside_a_base(
    base: Path, llama_folder: Path, given: dict[str, str]
) -> None:
    with pytest.raises(ConfigError, match="brings its encoder and mode"):
        with_overrides(tiny_config(llama_folder), base=str(base), **given)


def test_a_base_on_a_base(config: RunConfig, base: Path, tmp_path: Path) -> None:
    train(config, tmp_path / "added")
    with pytest.raises(ConfigError, match=f"has its encoder from {base}; give that run"):
        with_overrides(config, base=str(tmp_path / "added"))


def test_a_base_that_is_no_run_or_is_not_trained(
    config: RunConfig, base: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: no such file; is .* a run folder"):
        with_overrides(config, base=str(tmp_path))
    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"is .* a saved model"):
        train(with_overrides(config, base=str(tmp_path)), tmp_path / "added")


def test_an_encoder_that_the_base_does_not_have(config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="another encoder, bottleneck or mode than its base"):
        train(changed(config, encoder={"latents": 3}), tmp_path)


def test_a_stage_that_selects_on_a_base(config: RunConfig) -> None:
    stage = StageConfig("select", steps=1, objectives=weighted(answer=1.0, select=1.0))
    with pytest.raises(ConfigError, match="keeps its positions"):
        changed(config, stages=(stage,), encoder={"pooler": POOLERS.config("selected")})


def test_readers_added_without_a_name_for_them_are_the_presets(base: Path) -> None:
    assert list(with_overrides(load_preset("testbed"), base=str(base)).readers) == ["llama", "qwen"]


def test_added_readers_are_named_in_their_configuration(config: RunConfig) -> None:
    assert config.readers["added"] == ReaderConfig(config.readers["added"].source)
