"""Every pooler in turn: trained for two steps, saved, loaded; a text has the same states alone and
in a batch; all that was added gets gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from latentwire_fast.config.schema import PoolerConfig, RunConfig, StageConfig
from latentwire_fast.errors import ConfigError
from latentwire_fast.models.encoders.base import build_encoder
from latentwire_fast.models.encoders.lm import LMEncoder
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.models.poolers.pool_expand import expand, number_in_span
from latentwire_fast.models.poolers.spans import span_weights
from latentwire_fast.models.token_states import OneLayer, StatesFacts
from latentwire_fast.readers.reader import Reader
from latentwire_fast.registry import ENCODERS, POOLERS
from runs import tiny_config, train

TEXTS = ["Nulnak lives in Paris.", "Kel is 7.", "Nulnak has a red cat and Kel a blue dog. " * 3]

POOLED: dict[str, dict[str, Any]] = {
    "queries": {},
    "spans": {},
    "cross_attention": {"heads": 2, "states": 2, "layers": 1},
    "layer_spans": {"heads": 2, "states": 2, "layers": 1},
    "mean": {},
    "hierarchical": {"heads": 2},
    "convolution": {},
    "gated_queries": {"heads": 2},
    "pool_expand": {"heads": 2},
    "refiner": {"heads": 2, "pooler": POOLERS.config("spans")},
    "refiner of queries": {"heads": 2, "pooler": POOLERS.config("queries")},
}


@pytest.fixture(params=POOLED)
def pooler(request: pytest.FixtureRequest) -> PoolerConfig:
    return POOLERS.config(request.param.split()[0], **POOLED[request.param])


def encoder_of(reader: Reader, pooler: PoolerConfig, *, latents: int = 5) -> LMEncoder:
    torch.manual_seed(1)
    config = ENCODERS.config(
        "lm", source=reader.source, latents=latents, d_z=8, pooler=pooler, frozen=True
    )
    built = build_encoder(config, {reader.name: reader}).eval()
    assert isinstance(built, LMEncoder)
    return built


def run_config(pooler: PoolerConfig, *folders: Path) -> RunConfig:
    """A run of two steps, the second on quantised latents."""
    stages = (StageConfig("answer", steps=1), StageConfig("quantized", steps=1, quantize=6))
    return tiny_config(*folders, encoder={"pooler": pooler}, stages=stages)


@torch.no_grad()
def test_a_text_has_the_same_states_alone_and_in_a_batch(
    reader: Reader, pooler: PoolerConfig
) -> None:
    encoder = encoder_of(reader, pooler)
    together = encoder(TEXTS)
    alone = torch.cat([encoder([text]) for text in TEXTS])
    assert together.shape == (3, 5, 8)
    assert together.isfinite().all()
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert torch.cdist(together.flatten(1), together.flatten(1))[0, 1:].min() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("latents", [1, 40])
def test_one_latent_and_more_latents_than_tokens(
    readers: dict[str, Reader], pooler: PoolerConfig, latents: int
) -> None:
    encoder = encoder_of(readers["llama"], pooler, latents=latents)
    found = encoder(["", "Kel is 7."])
    assert found.shape == (2, latents, 8)
    assert found.isfinite().all()


def test_all_that_was_added_gets_gradients(reader: Reader, pooler: PoolerConfig) -> None:
    encoder = encoder_of(reader, pooler).train()
    (encoder(TEXTS) * torch.randn(3, 5, 8)).sum().backward()
    for name, parameter in encoder.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.any())
        assert reached == (not name.startswith("core.")), name


@torch.no_grad()
def test_under_bf16_autocast_it_is_close(readers: dict[str, Reader], pooler: PoolerConfig) -> None:
    encoder = encoder_of(readers["llama"], pooler)
    exact = encoder(TEXTS)
    with torch.autocast("cpu", torch.bfloat16):
        found = encoder(TEXTS)
    assert found.dtype == torch.float32
    similar = torch.nn.functional.cosine_similarity(found, exact, dim=-1)
    assert similar.mean() > 0.98


@pytest.mark.usefixtures("on_the_cpu")
def test_trained_saved_and_loaded(
    pooler: PoolerConfig, llama_folder: Path, qwen_folder: Path, tmp_path: Path
) -> None:
    trainer = train(run_config(pooler, llama_folder, qwen_folder), tmp_path)
    trained = trainer.session.model.eval()
    loaded = Interlingua.from_pretrained(tmp_path / "model")
    assert loaded.encoder_config == trained.encoder_config
    assert torch.equal(loaded.encode(TEXTS), trained.encode(TEXTS))
    assert loaded.encode_payloads(TEXTS) == trained.encode_payloads(TEXTS)


# --- single poolers ------------------------------------------------------------------------------


@pytest.mark.parametrize(("kernel", "stride"), [(4, 4), (4, 2), (5, 2), (3, 1)])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 9])
def test_a_convolution_sees_nothing_beside_the_text(kernel: int, stride: int, length: int) -> None:
    """Two rows hold the same text at other places, one of them between values of its own."""
    facts = StatesFacts(latents=2, width=8, layers=1, source="test")
    pooler = POOLERS["convolution"](
        POOLERS.config("convolution", kernel=kernel, stride=stride), facts
    )
    start = stride * stride  # where the strides begin anew
    states = torch.randn(2, start + length + 3, 8)
    inside = torch.zeros(states.shape[:2], dtype=torch.bool)
    inside[0, :length] = inside[1, start : start + length] = True
    states[1, start : start + length] = states[0, :length]
    first, second = pooler(OneLayer(states, inside))
    torch.testing.assert_close(first, second)


def test_what_a_mean_of_a_span_lacks() -> None:
    inside = torch.tensor([[False, True, True, True, True], [True, True, False, False, False]])
    states = torch.randn(2, 5, 3)
    weights = span_weights(inside, 2)
    rebuilt = expand(weights @ states, weights)
    first, second = states[0, 1:3].mean(0), states[0, 3:].mean(0)
    torch.testing.assert_close(rebuilt[0, 1:], torch.stack([first, first, second, second]))
    torch.testing.assert_close(rebuilt[1, :2], states[1, :2])
    assert not rebuilt[~inside].any()
    assert number_in_span(weights).tolist() == [[0, 0, 1, 0, 1], [0, 0, 0, 0, 0]]


def test_a_refiner_behind_chosen_positions(readers: dict[str, Reader]) -> None:
    selected = POOLERS.config("selected")
    refiner = POOLERS.config("refiner", heads=2, pooler=selected)
    assert refiner.selects_positions
    assert not POOLERS.config("refiner").selects_positions
    encoder = encoder_of(readers["llama"], refiner)
    with torch.no_grad():
        latent, selection = encoder.select(TEXTS)
        assert torch.equal(latent, encoder(TEXTS))
    assert torch.equal(selection.places_BM, selection.places_BM.sort(1).values)
    with pytest.raises(ConfigError, match="an objective that teaches positions"):
        tiny_config(Path("llama"), encoder={"pooler": refiner})
    with pytest.raises(ConfigError, match="pooler 'spans' selects no positions"):
        encoder_of(readers["llama"], POOLERS.config("refiner", heads=2)).select(TEXTS)


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("mean", {"heads": 2}, "pooler 'mean': .*'heads'"),
        ("hierarchical", {"stages": 0}, "stages=0, expected at least 1"),
        ("hierarchical", {"factor": 1}, "factor=1, expected at least 2"),
        ("convolution", {"layers": 0}, "layers=0, expected at least 1"),
        ("convolution", {"kernel": 2, "stride": 3}, "kernel=2 is less than stride=3"),
        ("gated_queries", {"heads": 0}, "heads=0, expected at least 1"),
        ("pool_expand", {"expansion": 0}, "expansion=0, expected at least 1"),
        ("refiner", {"layers": 0}, "layers=0, expected at least 1"),
        ("refiner", {"pooler": "spans"}, "pooler='spans', expected PoolerConfig"),
        ("hierarchical", {"dropout": 1.0}, r"dropout=1.0, expected in \[0, 1\)"),
    ],
)
def test_what_settings_cannot_be(kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        POOLERS.config(kind, **options)


@pytest.mark.parametrize("kind", ["hierarchical", "gated_queries", "pool_expand", "refiner"])
def test_heads_that_do_not_divide_the_width_are_refused(reader: Reader, kind: str) -> None:
    with pytest.raises(ConfigError, match=r"encoder\.pooler\.heads=7 does not divide the width"):
        encoder_of(reader, POOLERS.config(kind, heads=7))
