"""Pretrained models: no weight is drawn at random in silence, wherever the model comes from."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from latentwire_fast.errors import ConfigError
from latentwire_fast.models.encoders.base import build_encoder
from latentwire_fast.prompts.builder import Turn
from latentwire_fast.readers.loading import load_weights
from latentwire_fast.readers.reader import Reader
from latentwire_fast.registry import ENCODERS
from latentwire_fast.serving import Receiver
from readers import tiny_model

UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.norm.weight"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def folder(llama_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama, to be broken."""
    return Path(shutil.copytree(llama_folder, tmp_path / "broken"))


def edit_weights(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("source", ["{tmp}/nobody", "./nobody", "../no/body", "~/nobody"])
def test_a_path_to_nothing_is_no_hub_id(tmp_path: Path, source: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot load '.*body': no such folder"):
        load_weights(AutoModel, source.format(tmp=tmp_path))


def test_a_file_is_no_model(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json' is a file; give the folder"):
        Reader.load(folder / "config.json", name="file")


def test_missing_weights_are_named(folder: Path) -> None:
    edit_weights(folder, lambda t: (t.pop(UP), t.pop(NORM)))
    with pytest.raises(ConfigError) as error:
        Reader.load(folder, name="broken")
    message = str(error.value)
    assert f"{folder}' does not hold the weights of a LlamaForCausalLM: {UP} is missing" in message
    assert f"{NORM} is missing; save the model again" in message
    assert "\n" not in message
    with pytest.raises(ConfigError, match=r"weights of a LlamaModel: layers\.1\.mlp\.up_proj"):
        build_encoder(ENCODERS.config("lm", source=str(folder)), {})


def test_of_many_missing_weights_the_first_are_named(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=3)
    with pytest.raises(ConfigError, match=r"model.layers.2.*, \.\.\. \(9 in all\)"):
        Reader.load(folder, name="broken")


def test_weights_of_another_shape_are_named(folder: Path) -> None:
    edit_weights(folder, lambda t: t.update({NORM: torch.ones(5)}))
    with pytest.raises(ConfigError, match=rf"{NORM} is \(5,\), not \(32,\); save"):
        Reader.load(folder, name="broken")


def test_a_model_without_its_head_is_no_reader_but_starts_an_encoder(folder: Path) -> None:
    edit_config(folder, tie_word_embeddings=False)
    with pytest.raises(ConfigError, match=r"lm_head\.weight is missing"):
        Reader.load(folder, name="broken")
    encoder = build_encoder(ENCODERS.config("lm", source=str(folder)), {})
    assert encoder.config.source == str(folder)


def test_the_embedding_may_be_stored_under_either_of_its_names(
    folder: Path, llama_folder: Path
) -> None:
    edit_weights(folder, lambda t: t.update({"lm_head.weight": t.pop(EMBEDDING)}))
    reader = Reader.load(folder, name="tied")
    assert reader.head_weight is reader.embedding.weight
    expected = load_file(llama_folder / "model.safetensors")[EMBEDDING]
    assert torch.equal(reader.head_weight, expected)
    edit_weights(folder, lambda t: t.pop("lm_head.weight"))
    with pytest.raises(ConfigError, match=f"lm_head.weight is missing, {EMBEDDING} is missing"):
        Reader.load(folder, name="tied")


def test_superfluous_weights_are_a_warning_where_they_may_be_a_layer(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit_config(folder, num_hidden_layers=1)
    Reader.load(folder, name="short")
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "left out, not part of a LlamaForCausalLM: model.layers.1.input_layernorm" in caplog.text


def test_a_head_is_superfluous_to_an_encoder_without_a_word(
    tmp_path: Path, llama_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("llama", llama_tokenizer)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" in load_file(tmp_path / "model.safetensors")
    core = load_weights(AutoModel, tmp_path)
    assert torch.equal(core.embed_tokens.weight, model.model.embed_tokens.weight)
    assert not caplog.records


def test_transformers_speaks_as_loud_as_before(folder: Path) -> None:
    before = transformers_logging.get_verbosity()
    edit_weights(folder, lambda t: t.pop(NORM))
    with pytest.raises(ConfigError):
        load_weights(AutoModelForCausalLM, folder)
    assert transformers_logging.get_verbosity() == before


def test_a_reader_that_computes_nan_is_refused(folder: Path) -> None:
    edit_weights(folder, lambda t: t[UP].fill_(torch.nan))
    with pytest.raises(ConfigError, match=r"'broken' .* computes NaN or infinity"):
        Reader.load(folder, name="broken")


# --- what libraries say (F33) -------------------------------------------------------------------


def test_a_model_without_sdpa_keeps_the_hint(llama_tokenizer: PreTrainedTokenizerFast) -> None:
    """transformers ends its long message with what to do: load with eager attention."""
    with pytest.raises(ConfigError) as error:
        load_weights(_NoSdpa, "testbed:llama", attn_implementation="sdpa")
    message = str(error.value)
    assert "does not support an attention implementation through" in message
    assert 'attn_implementation="eager"' in message
    assert "\n" not in message
    assert len(message) < 500


class _NoSdpa:
    """As transformers answers for an architecture without it."""

    @staticmethod
    def from_pretrained(*_: object, **__: object) -> None:
        raise ValueError(
            "OldForCausalLM does not support an attention implementation through "
            "torch.nn.functional.scaled_dot_product_attention yet. Please request the support for "
            "this architecture: https://github.com/huggingface/transformers/issues/28005. If you "
            "believe this error is a bug, please open an issue.\nLoad the model with the argument "
            '`attn_implementation="eager"` meanwhile. Example: `model = AutoModel.from_pretrained('
            '"openai/whisper-tiny", attn_implementation="eager")`'
        )


@pytest.mark.parametrize("part", ["config", "tokenizer"])
def test_custom_code_is_refused_without_a_prompt(
    folder: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    if part == "config":
        edit_config(
            folder,
            model_type="own",
            auto_map={
                "AutoConfig": "own.OwnConfig",
                "AutoModelForCausalLM": "own.OwnModel",
            },
        )
    else:
        path = folder / "tokenizer_config.json"
        own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
        path.write_text(json.dumps({**json.loads(path.read_text()), **own}))
    with pytest.raises(ConfigError, match="brings its own Python code, which is not run"):
        Reader.load(folder, name="own")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft, about transformers
def test_a_lora_adapter_is_a_reader(llama_folder: Path, tmp_path: Path) -> None:
    """What the optional dependency `lora` is for: its folder is loaded with the model under it."""
    peft = pytest.importorskip("peft")
    options = peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False)
    model = AutoModelForCausalLM.from_pretrained(llama_folder)
    peft.get_peft_model(model, options).save_pretrained(tmp_path)
    base = Reader.load(llama_folder, name="base")
    base.tokenizer.save_pretrained(tmp_path)
    adapted = Reader.load(tmp_path, name="adapted")
    assert adapted.fingerprint != base.fingerprint
    assert not any(p.requires_grad for p in adapted.model.parameters())
    prompt = base.prompts.build([Turn("Who?")], context="Nulnak is old.")
    ours, theirs = (Receiver.for_text(r).prefill([prompt]).logits_BV for r in (adapted, base))
    assert not torch.allclose(ours, theirs, atol=0.1)
