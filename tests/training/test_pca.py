"""Principal components as an encoder: kept, trained on from, and added to."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from latentwire_fast.config.presets import weighted
from latentwire_fast.config.schema import RunConfig, StageConfig
from latentwire_fast.config.serialization import run_config_from_json, to_json
from latentwire_fast.errors import ConfigError, DataError
from latentwire_fast.models.encoders.pca import PCAEncoder
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.readers.reader import Reader
from latentwire_fast.registry import ENCODERS, POOLERS
from runs import assert_same_run, soft, stop_after_a_step, tiny_config, train

pytestmark = pytest.mark.usefixtures("on_the_cpu")

TEXTS = [f"Person {i} is {20 + i} years old and lives in town {i * i}." for i in range(12)]
USES: dict[str, dict[str, Any]] = {
    "frozen": {},
    "frozen, learned pooler": {"pooler": POOLERS.config("gated_queries", heads=2), "layer": 1},
    "start": {"use": "start", "pooler": POOLERS.config("queries"), "whiten": True},
    "hybrid": {"use": "hybrid", "layer": 0, "fit_on": "tokens", "hidden": 8},
}


def config_of(folder: Path, **options: Any) -> RunConfig:
    """Two steps with an encoder of principal components."""
    options = {"source": str(folder), "latents": 4, "d_z": 8, "fit_texts": 6, **options}
    return tiny_config(
        folder,
        encoder=ENCODERS.config("pca", **options),
        attachments=(soft("linear"),),
        stages=(StageConfig("s", steps=2, objectives=weighted(answer=1.0), quantize=6),),
    )


@pytest.mark.parametrize("use", USES)
def test_it_is_trained_saved_loaded_and_resumed(
    use: str, llama_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(llama_folder, **USES[use])
    assert run_config_from_json(to_json(config)) == config
    with caplog.at_level(logging.INFO, logger="latentwire_fast"):
        whole = train(config, tmp_path / "whole")
    assert "PCA: 8 components hold" in caplog.text
    stop_after_a_step(config, tmp_path / "cut")
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="latentwire_fast"):
        assert_same_run(train(config, tmp_path / "cut", process=2), whole)
    assert "PCA" not in caplog.text, "a checkpoint holds the fit"
    ours = whole.session.model.eval()
    loaded = Interlingua.from_pretrained(whole.folder.model)
    assert torch.equal(loaded.encode(TEXTS), ours.encode(TEXTS))
    assert loaded.encoder.facts() == ours.encoder.facts()
    trained = {n.split(".")[1] for n, _ in ours.trained_parameters() if n.startswith("encoder.")}
    wanted = {
        "frozen": set(),
        "frozen, learned pooler": {"pooler"},
        "start": {"pooler", "norm", "project"},
        "hybrid": {"added"},
    }
    assert trained == wanted[use]


def fitted(readers: dict[str, Reader], **options: Any) -> PCAEncoder:
    """An encoder that is fitted to `TEXTS`."""
    settings = ENCODERS.config("pca", source=readers["llama"].source, latents=4, d_z=8, **options)
    encoder = PCAEncoder.build(settings, readers)
    encoder.fit(TEXTS)
    return encoder.eval()


@torch.no_grad()
def test_components_keep_the_most_of_the_spans(readers: dict[str, Reader]) -> None:
    """Their values are uncorrelated, and their variances what the fit says."""
    encoder = fitted(readers)
    states = encoder.norm(encoder.pooler(encoder._text(TEXTS, None))).flatten(0, 1)
    values = encoder.project(states)
    covariance = torch.cov(values.T, correction=0)
    variances = covariance.diagonal()
    assert (covariance - variances.diag()).abs().max() < 1e-4 * variances.max()
    assert torch.all(variances[:-1] >= variances[1:])
    whole = torch.cov(states.T, correction=0).diagonal().sum()
    size = encoder.project.weight.norm(dim=1)[0]
    facts = encoder.facts()
    assert facts["explained_variance"] == pytest.approx(float(variances.sum() / size**2 / whole))
    assert facts["vectors"] == 4 * len(TEXTS)
    assert float(values.square().mean()) == pytest.approx(1.0, rel=1e-3)


@torch.no_grad()
def test_whitened_components_have_one_variance(readers: dict[str, Reader]) -> None:
    encoder = fitted(readers, whiten=True)
    states = encoder.norm(encoder.pooler(encoder._text(TEXTS, None)))
    values = encoder.project(states).flatten(0, 1)
    torch.testing.assert_close(values.var(0, correction=0), torch.ones(8), rtol=1e-3, atol=0)


@torch.no_grad()
def test_a_chosen_layer_is_of_the_text_alone(readers: dict[str, Reader]) -> None:
    """Nothing of the template around it, and nothing of the texts beside it."""
    encoder, prompts = fitted(readers, layer=0), readers["llama"].prompts
    texts = ["One.", TEXTS[3]]
    states, lengths = encoder._text(texts, None).hidden()
    for text, state, length in zip(texts, states, lengths, strict=True):
        ids = torch.tensor(prompts.build_context(text).ids)
        behind = len(prompts.label_ids) + prompts.content_start
        own = ids[behind : behind + length]
        assert torch.equal(state[:length], readers["llama"].embedding(own))
    together = encoder(texts)
    torch.testing.assert_close(encoder(texts[1:])[0], together[1])


def test_it_checks_itself(llama_folder: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"frozen": False}, "take use='start', or frozen=True"),
        ({"layer": 1, "pooler": POOLERS.config("queries")}, "pooler 'queries' runs all of the LM"),
        ({"layer": -1}, "layer=-1, expected 0 or above"),
        ({"fit_texts": 0}, "fit_texts=0, expected at least 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            config_of(llama_folder, **options)
    for options, message in (
        ({"layer": 9}, "has 2 layers; take one of them"),
        ({"d_z": 99}, "have 32 components; take fewer"),
    ):
        with pytest.raises(ConfigError, match=message):
            train(config_of(llama_folder, **options), tmp_path / "run")
    few = config_of(llama_folder, fit_texts=1)
    with pytest.raises(DataError, match="too few for 8 principal axes; fit to more texts"):
        train(replace(few, seed=1), tmp_path / "few")
