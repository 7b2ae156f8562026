"""The saved model: bit-equal after a round trip, and nothing else is taken for it."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from latentwire_fast import wire
from latentwire_fast.config.schema import ReaderConfig, RunConfig
from latentwire_fast.errors import CheckpointError, ConfigError, PayloadError
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.models.saved_model import config_digest
from latentwire_fast.readers.reader import Reader, load_readers
from latentwire_fast.registry import ENCODERS, POOLERS
from latentwire_fast.training.builders import build_model
from readers import tiny_model
from runs import soft, tiny_config

WIDTHS = [16, 8, 6, 4]


def build(config: RunConfig, *, seed: int = 0) -> Interlingua:
    """A model whose every parameter is away from its initial value."""
    torch.manual_seed(seed)
    model = build_model(config, load_readers(config.readers)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def config(llama_folder: Path, qwen_folder: Path) -> RunConfig:
    return tiny_config(llama_folder, qwen_folder)


@pytest.fixture(scope="module")
def model(config: RunConfig) -> Interlingua:
    return build(config)


@pytest.fixture(scope="module")
def contexts() -> list[str]:
    return ["Nulnak is already 94 years old.", "The dog of Bakrim is named Fosvun. It is old.", "é"]


@pytest.fixture
def folder(model: Interlingua, tmp_path: Path) -> Path:
    return model.save_pretrained(tmp_path / "model")


# --- round trips --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"encoder": {"pooler": POOLERS.config("queries")}},
        {"encoder": ENCODERS.config("byte", latents=4, d_z=8, width=16)},
        {"attachments": (soft("linear", tanh=True, calibration="example", gain=0.5),)},
        {"mode": "pure", "bottleneck": {"bits": 4, "group_size": 64}},
        {"encoder": {"frozen": True}},
    ],
    ids=["spans", "queries", "byte", "linear adapter", "pure", "frozen"],
)
@torch.no_grad()
def test_a_saved_model_is_loaded_bit_by_bit(
    llama_folder: Path, qwen_folder: Path, tmp_path: Path, contexts: list[str], change: dict
) -> None:
    model = build(tiny_config(llama_folder, qwen_folder, **change))
    loaded = Interlingua.from_pretrained(model.save_pretrained(tmp_path))
    assert not loaded.training
    state, again = model.state_dict(), loaded.state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(state[k], again[k]) for k in state)
    assert all(state[k].dtype == again[k].dtype for k in state)
    assert loaded.fingerprint == model.fingerprint
    assert loaded.cards == model.cards
    parts = ("mode", "encoder_config", "bottleneck_config", "attachment_configs")
    assert all(getattr(loaded, part) == getattr(model, part) for part in parts)
    questions = ["How old?"] * len(contexts) if model.mode == "pure" else None
    latent = model.encode(contexts, questions)
    assert torch.equal(loaded.encode(contexts, questions), latent)
    for name in model.cards:
        assert torch.equal(loaded.prefix(name, latent), model.prefix(name, latent))
        for task in ("autoencode", "continue"):
            assert torch.equal(
                loaded.reader_inputs(name, latent, task=task)["prefixes"],
                model.reader_inputs(name, latent, task=task)["prefixes"],
            )
    payloads = model.encode_payloads(contexts, questions)
    assert loaded.encode_payloads(contexts, questions) == payloads
    assert torch.equal(loaded.decode_payloads(payloads), model.decode_payloads(payloads))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@torch.no_grad()
def test_the_encoder_is_fp32_whatever_the_readers_are(
    llama_folder: Path, tmp_path: Path, contexts: list[str], dtype: str
) -> None:
    """A copy of a half-precision reader trains in fp32, and must come back so."""
    config = tiny_config(
        llama_folder,
        readers={"llama": ReaderConfig(str(llama_folder), dtype=dtype)},  # type: ignore[arg-type]
    )
    model = build(config)
    loaded = Interlingua.from_pretrained(model.save_pretrained(tmp_path))
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.encode(contexts), model.encode(contexts))


def test_saving_leaves_the_model_usable_and_the_trained_parts_counted(
    model: Interlingua, folder: Path
) -> None:
    stored = json.loads((folder / "config.json").read_text())
    trained = model.trained_parameters()
    assert stored["trained_parameters"] == sum(p.numel() for _, p in trained)
    assert stored["trained_parameters"] == sum(v.numel() for v in model.trained_state().values())
    assert {name.split(".")[0] for name, _ in trained} == {"encoder", "attachments", "task_tokens"}
    assert next(model.parameters()).requires_grad


@torch.no_grad()
def test_the_fingerprint_is_the_encoders(config: RunConfig) -> None:
    """New adapters (a third reader) keep reading old payloads; another encoder does not."""
    one, same = build(config), build(config)
    for parameter in same.attachments.parameters():
        parameter.add_(1.0)
    assert same.fingerprint == one.fingerprint
    assert 0 <= one.fingerprint <= 0xFFFF
    other = build(config)
    next(other.encoder.parameters()).view(-1)[0] += 1e-3
    assert other.fingerprint != one.fingerprint


# --- payloads -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", WIDTHS)
@torch.no_grad()
def test_what_is_decoded_is_what_training_quantised(
    model: Interlingua, contexts: list[str], bits: int
) -> None:
    latent = model.encode(contexts)
    payloads = model.payloads(latent, bits=bits)
    decoded = model.decode_payloads(payloads)
    assert torch.equal(decoded, model.quantize(latent, bits))
    assert decoded.shape == latent.shape
    headers = [wire.read_header(payload) for payload in payloads]
    assert {(h.bits, h.latents, h.d_z) for h in headers} == {(bits, 4, 8)}
    assert {h.fingerprint for h in headers} == {model.fingerprint}
    assert {len(p) for p in payloads} == {16 + headers[0].body_bytes}
    error = (decoded - latent).abs().max()
    assert error <= {16: 2e-3, 8: 0.03, 6: 0.12, 4: 0.5}[bits]


@torch.no_grad()
def test_the_models_own_width_is_the_default(model: Interlingua, contexts: list[str]) -> None:
    latent = model.encode(contexts)
    assert model.payloads(latent) == model.payloads(latent, bits=6)
    assert torch.equal(model.quantize(latent), model.quantize(latent, 6))
    assert model.encode_payloads(contexts, bits=4) == model.payloads(latent, bits=4)
    with pytest.raises(PayloadError, match="bits"):  # 0 is a width too, and none that there is
        model.payloads(latent, bits=0)
    with pytest.raises(ConfigError, match="bits is 0"):
        model.quantize(latent, 0)


@pytest.mark.parametrize("bits", WIDTHS)
def test_gradients_pass_straight_through(model: Interlingua, bits: int) -> None:
    latent = torch.randn(2, 4, 8, requires_grad=True)
    upstream = torch.randn(2, 4, 8)
    (model.quantize(latent, bits) * upstream).sum().backward()
    assert latent.grad is not None
    torch.testing.assert_close(latent.grad, upstream)


@torch.no_grad()
def test_payloads_of_another_model_are_refused(
    model: Interlingua, config: RunConfig, contexts: list[str]
) -> None:
    stranger = build(config, seed=1)
    payloads = [*model.encode_payloads(contexts[:1]), *stranger.encode_payloads(contexts[:1])]
    with pytest.raises(PayloadError, match=rf"payload 1 was written by .*{model.fingerprint:#06x}"):
        model.decode_payloads(payloads)


def test_a_model_of_another_version_is_refused(model: Interlingua, tmp_path: Path) -> None:
    folder = model.save_pretrained(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    for card in config["readers"].values():
        del card["kv"]
    config["sha256"] = config_digest(config)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=r"saved by another version .*'kv'.*train the model again"
    ):
        Interlingua.from_pretrained(folder)


def test_an_older_format_is_refused_with_what_to_do(model: Interlingua, tmp_path: Path) -> None:
    folder = model.save_pretrained(tmp_path)
    config = json.loads((folder / "config.json").read_text()) | {"format_version": 1}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"format version 1, this release reads 2; train the"):
        Interlingua.from_pretrained(folder)


def test_payloads_of_another_shape_are_refused(model: Interlingua) -> None:
    payload = wire.pack(torch.zeros(5, 8), bits=6, group_size=32, fingerprint=model.fingerprint)
    with pytest.raises(PayloadError, match=r"latents \(5, 8\), this model's are \(4, 8\)"):
        model.decode_payloads([payload])


@torch.no_grad()
def test_damaged_payloads_are_refused(model: Interlingua, contexts: list[str]) -> None:
    payload = bytearray(model.encode_payloads(contexts[:1])[0])
    payload[20] ^= 1
    with pytest.raises(PayloadError):
        model.decode_payloads([bytes(payload)])


def test_modes_are_kept_apart(model: Interlingua, llama_folder: Path, contexts: list[str]) -> None:
    with pytest.raises(ConfigError, match="'context' mode: its encoder reads no question"):
        model.encode(contexts, ["Who?"] * len(contexts))
    pure = build(tiny_config(llama_folder, mode="pure"))
    with pytest.raises(ConfigError, match="'pure' mode: its encoder needs the question"):
        pure.encode(contexts)


# --- readers ------------------------------------------------------------------------------------


def test_texts_come_as_a_list(model: Interlingua, contexts: list[str]) -> None:
    for texts in (contexts[0], [], ()):
        with pytest.raises(ConfigError, match="no list of texts to encode; give a list"):
            model.encode_payloads(texts)
        with pytest.raises(ConfigError, match="no list of texts to encode; give a list"):
            model.encode(texts)


def test_only_the_readers_it_was_trained_for(
    model: Interlingua, config: RunConfig, llama_tokenizer: Any
) -> None:
    readers = load_readers(config.readers)
    for reader in readers.values():
        model.check_reader(reader)
    with pytest.raises(ConfigError, match=r"no adapter for reader 'gpt'.*\['llama', 'qwen2'\]"):
        model.check_reader(Reader(readers["llama"].model, readers["llama"].tokenizer, name="gpt"))
    with pytest.raises(ConfigError, match="no adapter for reader 'gpt'"):
        model.prefix("gpt", torch.zeros(1, 4, 8))
    other = Reader(tiny_model("llama", llama_tokenizer, seed=1), llama_tokenizer, name="llama")
    with pytest.raises(CheckpointError, match=r"other weights .* than the adapter was trained for"):
        model.check_reader(other)


def test_one_changed_weight_makes_another_reader(model: Interlingua, config: RunConfig) -> None:
    reader = load_readers(config.readers)["llama"]
    with torch.no_grad():
        reader.model.lm_head.weight[-1, -1] += 1e-6
    other = Reader(reader.model, reader.tokenizer, name="llama")
    with pytest.raises(CheckpointError, match="other weights"):
        model.check_reader(other)


# --- damage, and hostile files (S2) -------------------------------------------------------------


def refused(folder: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        Interlingua.from_pretrained(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model.safetensors",
        "encoder/config.json",
        "encoder/tokenizer.json",
        "encoder",
    ],
)
def test_a_missing_part_is_refused(folder: Path, name: str) -> None:
    path = folder / name
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    refused(folder)


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "encoder/config.json", "encoder/tokenizer.json"]
)
def test_a_cut_file_is_refused(folder: Path, name: str, keep: float) -> None:
    path = folder / name
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    refused(folder)


@pytest.mark.parametrize("at", [0, 9, 100, 0.3, 0.6, -1])
def test_a_changed_bit_of_the_weights_is_refused(folder: Path, at: float) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[int(len(data) * at) if isinstance(at, float) else at] ^= 1
    path.write_bytes(data)
    refused(folder)


def leaves(value: Any, path: tuple = ()) -> list[tuple]:
    """The path of every single value in nested JSON."""
    if not isinstance(value, dict):
        return [path]
    return [found for key in value for found in leaves(value[key], (*path, key))]


def at(value: dict, path: tuple) -> tuple[dict, str]:
    for key in path[:-1]:
        value = value[key]
    return value, path[-1]


@pytest.mark.parametrize("how", ["removed", "changed", "of another type"])
def test_every_value_of_the_configuration_counts(folder: Path, how: str) -> None:
    path = folder / "config.json"
    text = path.read_text()
    for leaf in leaves(json.loads(text)):
        config = json.loads(text)
        owner, key = at(config, leaf)
        old = owner.pop(key)
        if how == "changed":
            changes = {str: "other", int: 77, float: 0.77, bool: old is False, list: []}
            changes |= {type(None): "other"}
            owner[key] = changes[type(old)]
        elif how == "of another type":
            owner[key] = [old]
        path.write_text(json.dumps(config))
        refused(folder)
    path.write_text(text)
    Interlingua.from_pretrained(folder)


@pytest.mark.parametrize(
    "text", ["[]", "7", "null", '"text"', "{}", '{"format_version": 2}', "\x00"]
)
def test_other_json_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    refused(folder)


def test_weights_of_another_model_are_refused(
    model: Interlingua, config: RunConfig, folder: Path, tmp_path: Path
) -> None:
    other = build(config, seed=1).save_pretrained(tmp_path / "other")
    shutil.copy(other / "model.safetensors", folder / "model.safetensors")
    refused(folder)


class Bomb:
    """Unpickling creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "write",
    [
        lambda path, bomb: path.write_bytes(pickle.dumps(bomb)),
        lambda path, bomb: torch.save({"weight": bomb}, path),
    ],
    ids=["pickle", "torch.save"],
)
@pytest.mark.parametrize("name", ["model.safetensors", "encoder/tokenizer.json", "config.json"])
def test_a_pickle_in_disguise_is_rejected_and_not_run(
    folder: Path, tmp_path: Path, name: str, write: Callable[[Path, Bomb], object]
) -> None:
    effect = tmp_path / "effect"
    write(folder / name, Bomb(effect))
    refused(folder)
    assert not effect.exists()
    pickle.loads(pickle.dumps(Bomb(effect)))
    assert effect.exists(), "the bomb does not work, so the test shows nothing"


def test_readers_come_from_safetensors_alone(llama_folder: Path, tmp_path: Path) -> None:
    """transformers would load a pytorch_model.bin where there are no safetensors (S2)."""
    effect = tmp_path / "effect"
    folder = tmp_path / "reader"
    shutil.copytree(llama_folder, folder)
    (folder / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Bomb(effect)}, folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="weights as pickles"):
        Reader.load(folder, name="llama")
    assert not effect.exists()
