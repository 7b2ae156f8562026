"""Encoders over a frozen text encoder: trained, saved, loaded; long texts are read in windows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from latentwire_fast.config.overrides import with_overrides
from latentwire_fast.config.schema import EncoderConfig, RunConfig, StageConfig
from latentwire_fast.config.serialization import run_config_from_json, to_json
from latentwire_fast.errors import ConfigError, DataError
from latentwire_fast.models.encoders.base import build_encoder
from latentwire_fast.models.encoders.frozen_text import FrozenTextEncoder
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.models.text_model import TextModel, TextModelStates
from latentwire_fast.registry import ENCODERS, POOLERS
from latentwire_fast.training.budget import budget
from latentwire_fast.training.builders import absolute_paths
from runs import records, tiny_config, tiny_squad, train

TEXTS = ["Nulnak lives in Paris.", "Kel is 7.", "Nulnak has a red cat and Kel a blue dog. " * 4]
KINDS = ("sentence", "token_query")


@pytest.fixture(params=["bert_folder", "roberta_folder"])
def folder(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(request.param)
    return found


def settings(kind: str, folder: Path, **options: Any) -> EncoderConfig:
    config: EncoderConfig = ENCODERS.config(
        kind, text_encoder=str(folder), latents=5, d_z=8, **options
    )
    return config


def encoder_of(config: EncoderConfig) -> FrozenTextEncoder:
    torch.manual_seed(1)
    built = build_encoder(config, {}).eval()
    assert isinstance(built, FrozenTextEncoder)
    return built


def run_config(encoder: EncoderConfig, *folders: Path, **changes: Any) -> RunConfig:
    """A run of two steps, the second on quantised latents."""
    stages = (StageConfig("answer", steps=1), StageConfig("quantized", steps=1, quantize=6))
    return tiny_config(*folders, **{"stages": stages, **changes}, encoder=encoder)


# --- the text encoder -----------------------------------------------------------------------------


@torch.no_grad()
def test_states_are_those_of_the_model_called_by_hand(folder: Path) -> None:
    model = TextModel.of(str(folder))
    whole = model.tokenizer(TEXTS[0], return_tensors="pt")
    ids = model.text.ids(TEXTS[0])
    assert whole["input_ids"][0, 1:-1].tolist() == ids
    by_hand = AutoModel.from_pretrained(folder).eval()(
        input_ids=whole["input_ids"], output_hidden_states=True
    )
    states, is_text = TextModelStates(model, [ids, ids[:3]]).all_layers()
    for ours, theirs in zip(states, by_hand.hidden_states, strict=True):
        torch.testing.assert_close(ours[0], theirs[0, 1:-1], rtol=1e-4, atol=1e-5)
    assert is_text.sum(1).tolist() == [len(ids), 3]


@torch.no_grad()
def test_a_long_text_is_read_in_windows_of_near_equal_length(folder: Path) -> None:
    model = TextModel.of(str(folder))
    ids = model.text.ids(TEXTS[2])[:45]  # 22 fit beside the special tokens
    (states,) = model.run([ids], [2])
    windows = model.run([ids[:15], ids[15:30], ids[30:]], [2])
    torch.testing.assert_close(states, torch.cat(windows, 1), rtol=1e-4, atol=1e-5)


def test_a_model_with_a_decoder_is_refused(bert_folder: Path) -> None:
    model = TextModel.of(str(bert_folder))
    model.core.config.is_encoder_decoder = True
    with pytest.raises(ConfigError, match=r"has a decoder, .* an encoder alone, such as a BERT"):
        TextModel(model.core, model.tokenizer, source="t5")


# --- the encoders ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pure", [False, True], ids=["context", "pure"])
@torch.no_grad()
def test_a_text_has_the_same_latent_alone_and_in_a_batch(
    kind: str, folder: Path, pure: bool
) -> None:
    encoder = encoder_of(settings(kind, folder))
    questions = ["Who?", "How old?", "What colour?"] if pure else None
    together = encoder(TEXTS, questions)
    assert together.shape == (3, 5, 8)
    torch.testing.assert_close(together.pow(2).mean(-1), torch.ones(3, 5), rtol=1e-3, atol=1e-3)
    for i, text in enumerate(TEXTS):
        alone = encoder([text], None if questions is None else [questions[i]])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)
    assert torch.cdist(together.flatten(1), together.flatten(1))[0, 1:].min() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_text_beyond_the_limit_is_cut_or_refused(kind: str, bert_folder: Path) -> None:
    encoder = encoder_of(settings(kind, bert_folder, max_tokens=12))
    assert torch.equal(encoder([TEXTS[2]]), encoder([TEXTS[2][:60]]))
    asked = encoder([TEXTS[2]] * 2, ["Who?", "Where?"])
    assert not torch.allclose(asked[0], asked[1], atol=1e-3), "the question is kept"
    with pytest.raises(DataError, match=r"tokens, the encoder reads 12; cut it"):
        encoder.check_length(TEXTS[2])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_any_unicode_is_encoded(kind: str, folder: Path) -> None:
    encoder = encoder_of(settings(kind, folder))
    assert encoder(["", "é", "日本語 🙂", "[SEP] [CLS] [PAD]"]).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_all_but_the_text_encoder_is_trained(kind: str, folder: Path) -> None:
    encoder = encoder_of(settings(kind, folder)).train()
    assert not encoder.text_model.core.training
    (encoder(TEXTS) * torch.randn(3, 5, 8)).sum().backward()
    for name, parameter in encoder.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.any())
        assert reached == (not name.startswith("text_model.")), name


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_under_bf16_autocast_it_is_close(kind: str, bert_folder: Path) -> None:
    encoder = encoder_of(settings(kind, bert_folder))
    exact = encoder(TEXTS)
    with torch.autocast("cpu", torch.bfloat16):
        found = encoder(TEXTS)
    assert found.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(found, exact, dim=-1).mean() > 0.98


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("kind", KINDS)
def test_trained_saved_and_loaded(
    kind: str, folder: Path, llama_folder: Path, qwen_folder: Path, tmp_path: Path
) -> None:
    config = run_config(settings(kind, folder), llama_folder, qwen_folder)
    assert run_config_from_json(to_json(config)) == config
    trained = train(config, tmp_path).session.model.eval()
    before = AutoModel.from_pretrained(folder, add_pooling_layer=False).state_dict()
    for name, weight in trained.encoder.text_model.core.state_dict().items():
        assert torch.equal(weight, before[name])
    loaded = Interlingua.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded.encode(TEXTS), trained.encode(TEXTS))
    assert loaded.encode_payloads(TEXTS) == trained.encode_payloads(TEXTS)


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("kind", KINDS)
def test_kept_states_train_the_same(
    kind: str, bert_folder: Path, llama_folder: Path, tmp_path: Path
) -> None:
    data = {"source": str(tiny_squad(tmp_path / "data.json"))}
    config = run_config(settings(kind, bert_folder), llama_folder, data=data)
    kept = train(config, tmp_path / "kept")
    cache = kept.session.model.encoder.states_cache
    assert cache is not None
    assert cache.misses > 0
    assert kept.session.model.encoder.kept_bytes(TEXTS[0]) > 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FrozenTextEncoder, "keep_states", lambda *_, **__: None)
        train(config, tmp_path / "plain")
    for ours, theirs in zip(records(tmp_path / "kept"), records(tmp_path / "plain"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-2)


@pytest.mark.parametrize("pooler", ["spans", "hierarchical", "cross_attention", "convolution"])
@torch.no_grad()
def test_other_poolers_over_a_text_encoder(pooler: str, bert_folder: Path) -> None:
    config = settings("token_query", bert_folder, pooler=POOLERS.config(pooler))
    encoder = encoder_of(config)
    together = encoder(TEXTS)
    alone = torch.cat([encoder([text]) for text in TEXTS])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooler", ["queries", "selected"])
def test_poolers_that_need_a_causal_lm_are_refused(pooler: str, bert_folder: Path) -> None:
    inner = POOLERS.config(pooler)
    for chosen in (inner, POOLERS.config("refiner", pooler=inner)):
        message = f"pooler '{chosen.kind}' needs a causal LM, which encoder 'token_query' does not"
        with pytest.raises(ConfigError, match=message):
            settings("token_query", bert_folder, pooler=chosen)


@pytest.mark.parametrize("kind", KINDS)
def test_other_readers_leave_the_text_encoder(
    kind: str, bert_folder: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config(settings(kind, bert_folder), llama_folder)
    assert with_overrides(config, readers={"a": "b"}).encoder == config.encoder
    with pytest.raises(ConfigError, match=f"encoder '{kind}' starts from no LM: leave out"):
        with_overrides(config, encoder="other")
    monkeypatch.chdir(bert_folder.parent)
    here = replace(config, encoder=settings(kind, Path(bert_folder.name)))
    assert absolute_paths(here).encoder == config.encoder
    with pytest.raises(ConfigError, match=r"cannot load '/nowhere': no such folder"):
        encoder_of(settings(kind, Path("/nowhere")))
    with pytest.raises(ConfigError, match="max_tokens=0, expected at least 1"):
        settings(kind, bert_folder, max_tokens=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_dry_run_knows_its_size(kind: str, bert_folder: Path, llama_folder: Path) -> None:
    config = run_config(settings(kind, bert_folder), llama_folder)
    frozen = budget(config).frozen
    weights = TextModel.of(str(bert_folder)).core.parameters()
    assert frozen["encoder"] == sum(weight.numel() for weight in weights)
