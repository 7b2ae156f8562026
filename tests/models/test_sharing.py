"""Weights that parts of a run have in common are in memory once, and nobody changes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from latentwire_fast.config.presets import weighted
from latentwire_fast.config.schema import ReaderConfig, RunConfig, StageConfig
from latentwire_fast.errors import CheckpointError
from latentwire_fast.models.encoders import lm
from latentwire_fast.models.encoders.base import build_encoder
from latentwire_fast.models.encoders.lm import LMEncoder
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.readers.reader import Reader, load_readers
from latentwire_fast.registry import ENCODERS, POOLERS
from latentwire_fast.training.builders import build_model
from runs import changed, deep, model_digest, records, soft, tiny_config, train

pytestmark = pytest.mark.usefixtures("on_the_cpu")

SELECTED = {
    "encoder": {"pooler": POOLERS.config("selected"), "frozen": True},
    "attachments": (deep(width=16, heads=2, expansion=1),),
    "stages": (
        StageConfig("match", steps=2, objectives=weighted(select=1.0, kv=1.0)),
        StageConfig("answer", steps=2),
    ),
}


def encoder_of(reader: Reader, **options: Any) -> LMEncoder:
    """A frozen LM encoder from a reader's source."""
    config = ENCODERS.config("lm", **{"source": reader.source, "frozen": True, **options})
    encoder = build_encoder(config, {reader.name: reader})
    assert isinstance(encoder, LMEncoder)
    return encoder


@pytest.fixture
def readers(llama_folder: Path) -> dict[str, Reader]:
    """One reader of the test's own."""
    return load_readers({"llama": ReaderConfig(str(llama_folder))})


# --- readers ------------------------------------------------------------------------------------


def test_readers_of_one_source_share_a_model(llama_folder: Path, qwen_folder: Path) -> None:
    source = str(llama_folder)
    readers = load_readers(
        {
            "one": ReaderConfig(source),
            "two": ReaderConfig(source, bos=False),
            "half": ReaderConfig(source, dtype="bfloat16"),
            "other": ReaderConfig(str(qwen_folder)),
        }
    )
    assert readers["one"].model is readers["two"].model
    assert len({id(reader.model) for reader in readers.values()}) == 3
    assert [reader.name for reader in readers.values()] == ["one", "two", "half", "other"]
    assert readers["one"].prompts.build_context("a").ids[0] == readers["one"].tokenizer.bos_token_id
    assert readers["two"].prompts.build_context("a").ids[0] != readers["one"].tokenizer.bos_token_id
    assert readers["one"].fingerprint == readers["two"].fingerprint


def test_readers_that_share_a_model_are_known_in_any_dtype(llama_folder: Path) -> None:
    """A model was trained for the weights as they are stored, whatever they are computed in."""
    configs = {"one": ReaderConfig(str(llama_folder)), "two": ReaderConfig(str(llama_folder))}
    expected = load_readers(configs)["one"].fingerprint
    readers = load_readers(configs, dtype="bfloat16")
    assert readers["one"].model is readers["two"].model
    assert readers["one"].model.dtype == torch.bfloat16
    assert [reader.fingerprint for reader in readers.values()] == [expected] * 2


def test_a_shared_model_recomputes_its_layers_once(llama_folder: Path) -> None:
    """Each of its readers asks for it, and a layer is wrapped once."""
    readers = load_readers({name: ReaderConfig(str(llama_folder)) for name in ("one", "two")})
    layer = readers["one"].model.get_decoder().layers[0]
    for reader in readers.values():
        reader.enable_gradient_checkpointing()
    wrapped = layer.forward
    assert not hasattr(wrapped.args[0], "args")


# --- the encoder --------------------------------------------------------------------------------


def test_a_frozen_encoder_is_the_readers_own_module(readers: dict[str, Reader]) -> None:
    reader = readers["llama"]
    before = reader.weights_digest()
    encoder = encoder_of(reader)
    assert encoder.core is reader.backbone
    assert not any(p.requires_grad for p in encoder.core.parameters())
    assert not encoder.core.training
    encoder.train()
    assert encoder.training
    assert not reader.model.training, "dropout of a reader would change what it says"
    assert reader.weights_digest() == before


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"frozen": False}, "float32"),
        ({"gradient_checkpointing": True}, "float32"),
        ({}, "bfloat16"),
    ],
    ids=["trained", "checkpointed", "half precision"],
)
def test_an_encoder_that_would_change_a_reader_has_a_copy(
    llama_folder: Path, options: dict[str, Any], dtype: Any
) -> None:
    (reader,) = load_readers({"llama": ReaderConfig(str(llama_folder), dtype=dtype)}).values()
    before = reader.weights_digest()
    encoder = encoder_of(reader, **options)
    ours = {p.data_ptr() for p in encoder.parameters()}
    assert not ours & {p.data_ptr() for p in reader.model.parameters()}
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    assert reader.weights_digest() == before
    assert "forward" not in vars(reader.model.get_decoder().layers[0])


def test_an_encoder_of_another_source_shares_nothing(
    readers: dict[str, Reader], qwen_folder: Path
) -> None:
    assert encoder_of(readers["llama"], source=str(qwen_folder)).core is not readers["llama"].model


def test_a_saved_model_holds_the_shared_weights(
    readers: dict[str, Reader], llama_folder: Path, tmp_path: Path
) -> None:
    config = tiny_config(llama_folder, encoder={"frozen": True})
    model = build_model(config, readers).eval()
    assert isinstance(model.encoder, LMEncoder)
    assert model.encoder.core is readers["llama"].backbone
    loaded = Interlingua.from_pretrained(model.save_pretrained(tmp_path))
    state, again = model.state_dict(), loaded.state_dict()
    assert any(name.startswith("encoder.core.") for name in state)
    assert state.keys() == again.keys()
    assert all(torch.equal(state[name], again[name]) for name in state)
    assert loaded.fingerprint == model.fingerprint
    with torch.no_grad():
        assert torch.equal(loaded.encode(["some text"]), model.encode(["some text"]))


def test_loading_other_weights_does_not_reach_the_reader(readers: dict[str, Reader]) -> None:
    reader = readers["llama"]
    encoder = encoder_of(reader)
    state = {name: value.clone() for name, value in encoder.state_dict().items()}
    encoder.load_state_dict(state)
    before = reader.weights_digest()
    state["core.norm.weight"] += 1.0
    with pytest.raises(CheckpointError, match=r"other weights \(norm\.weight\) than the reader"):
        encoder.load_state_dict(state)
    assert reader.weights_digest() == before


@pytest.fixture(scope="module", params=["selected", "queries"])
def config(request: pytest.FixtureRequest, llama_folder: Path) -> RunConfig:
    """A frozen encoder and two readers of one source: one model in all. Gradients go through it
    where queries stand behind the text."""
    config = tiny_config(llama_folder)
    if request.param == "selected":
        config = changed(config, **SELECTED)
    else:
        encoder = {"pooler": POOLERS.config("queries", rehearsals=1), "frozen": True}
        config = changed(config, encoder=encoder, attachments=(soft(expansion=1, dropout=0.1),))
    source = str(llama_folder)
    return changed(config, readers={"one": ReaderConfig(source), "two": ReaderConfig(source)})


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_with_shared_weights_is_training_with_copies(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    config = changed(config, optim={"gradient_checkpointing": checkpointing})
    trainer = train(config, tmp_path / "shared")
    one, two = trainer.session.readers.values()
    assert trainer.session.model.encoder.core is one.backbone is two.backbone
    assert one.weights_digest() == trainer.session.model.cards["one"].fingerprint
    monkeypatch.setattr(lm, "_can_share", lambda *_: False)
    train(config, tmp_path / "copied")
    assert records(tmp_path / "shared") == records(tmp_path / "copied")
    assert model_digest(tmp_path / "shared") == model_digest(tmp_path / "copied")
