"""Low-rank updates of a reader: where they are put, on, off, merged, saved, and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from latentwire_fast.config.schema import LoraSettings
from latentwire_fast.errors import ConfigError
from latentwire_fast.prompts.builder import Turn
from latentwire_fast.readers.lora import ReaderLora
from latentwire_fast.readers.reader import Reader
from latentwire_fast.serving import Receiver, ReceiverOptions
from latentwire_fast.serving.engines import choose_engine
from readers import tiny_interlingua

pytest.importorskip("peft")


def drawn(reader: Reader, **settings: Any) -> ReaderLora:
    """Updates of a reader that change what it reads; fresh ones do not."""
    lora = ReaderLora.fresh(reader, LoraSettings(**settings))
    with torch.no_grad():
        for weight in lora.parameters():
            weight.normal_(std=0.3)
    return lora


def logprobs(reader: Reader) -> torch.Tensor:
    prompt = reader.prompts.build([Turn("Who?", "Bob")], context="Nulnak is old.")
    with torch.no_grad():
        return reader.score([prompt]).logprobs_NV


@pytest.fixture
def reader(llama_folder: Path) -> Reader:
    """A tiny reader of its own for each test: it is changed."""
    return Reader.load(llama_folder, name="llama")


def test_fresh_updates_change_nothing_and_trained_ones_can_be_switched_off(reader: Reader) -> None:
    before, digest = logprobs(reader), reader.fingerprint
    lora = drawn(reader, rank=4, dropout=0.5)
    assert not torch.equal(logprobs(reader), logprobs(reader)), "dropout"
    lora.eval()
    assert not torch.allclose(logprobs(reader), before, atol=0.1)
    with reader.base():
        assert torch.equal(logprobs(reader), before)
        with reader.base():
            assert torch.equal(logprobs(reader), before)
        assert torch.equal(logprobs(reader), before)
    assert not torch.allclose(logprobs(reader), before, atol=0.1)
    assert reader.weights_digest() == digest
    assert all(weight.requires_grad for weight in lora.parameters())
    assert lora.size == sum(weight.numel() for weight in lora.parameters())


def test_fresh_updates_are_none(reader: Reader) -> None:
    before = logprobs(reader)
    ReaderLora.fresh(reader, LoraSettings())
    assert torch.equal(logprobs(reader), before)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {f"{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qkvo"}),
        ({"layers": 1}, {f"0.self_attn.{p}_proj" for p in "qkvo"}),
        (
            {"projections": ("q_proj", "mlp.up_proj"), "layers": 2},
            {f"{i}.{p}" for i in (0, 1) for p in ("self_attn.q_proj", "mlp.up_proj")},
        ),
    ],
)
def test_updates_are_where_the_settings_say(
    reader: Reader, settings: dict[str, Any], expected: set[str]
) -> None:
    lora = ReaderLora.fresh(reader, LoraSettings(rank=3, **settings))
    places = {path.removeprefix("model/layers/").replace("/", ".") for path in lora.layers}
    assert places == expected
    assert all(parts["A"].weight.shape[0] == 3 for parts in lora.layers.values())


def test_the_attention_is_found_in_another_family(
    llama_tokenizer: PreTrainedTokenizerFast,
) -> None:
    """GPT-2 has other names, and its layers are transposed."""
    end = llama_tokenizer.eos_token_id
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": end, "eos_token_id": end}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(llama_tokenizer), **shape))
    reader = Reader(model, llama_tokenizer, name="gpt2")
    before = logprobs(reader)
    lora = drawn(reader, rank=4, layers=1).eval()
    assert [*lora.layers] == ["transformer/h/0/attn/c_attn", "transformer/h/0/attn/c_proj"]
    adapted = logprobs(reader)
    with reader.base():
        assert torch.equal(logprobs(reader), before)
    lora.merge()
    torch.testing.assert_close(logprobs(reader), adapted, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft, about transformers
def test_peft_itself_reads_what_is_saved(
    reader: Reader, llama_folder: Path, tmp_path: Path
) -> None:
    """And a folder with a tokenizer beside it is a reader's source: an ordinary model, merged."""
    import peft

    drawn(reader, rank=4, alpha=3.0).eval().save(tmp_path)
    prompt = reader.prompts.build([Turn("Who?")], context="Nulnak is old.")
    found = Receiver.for_text(reader).prefill([prompt]).logits_BV[0]
    model = AutoModelForCausalLM.from_pretrained(llama_folder)
    theirs = peft.PeftModel.from_pretrained(model, tmp_path)
    expected = theirs(torch.tensor([prompt.ids])).logits[0, -1]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    reader.tokenizer.save_pretrained(tmp_path)
    merged = Reader.load(tmp_path, name="merged")
    names = dict(merged.model.named_parameters())
    assert names.keys() == dict(Reader.load(llama_folder, name="x").model.named_parameters()).keys()
    assert merged.fingerprint != reader.fingerprint
    again = Receiver.for_text(merged).prefill([prompt]).logits_BV[0]
    torch.testing.assert_close(again, expected, atol=1e-4, rtol=1e-4)
    merged.model.save_pretrained(tmp_path / "whole")
    assert (tmp_path / "whole" / "config.json").exists(), "no longer saved as an adapter"


def test_merged_updates_read_the_same_and_stay(reader: Reader) -> None:
    """A reader whose updates are not merged is read op by op; merged, it is an ordinary one."""
    digest, lora = reader.fingerprint, drawn(reader)
    lora.eval()
    adapted = logprobs(reader)
    with pytest.raises(ConfigError, match=r"cannot be compiled: its low-rank updates.*merge_lora"):
        choose_engine("compile", reader)
    lora.merge()
    lora.merge()
    torch.testing.assert_close(logprobs(reader), adapted, atol=1e-4, rtol=1e-4)
    assert choose_engine("compile", reader)[0] == "compile"
    with pytest.raises(ConfigError, match=r"were merged into its weights; load it again"):
        reader.base().__enter__()
    assert reader.fingerprint == digest, "what models know it by"


def test_a_model_brings_its_updates_to_the_reader(
    reader: Reader, llama_folder: Path, tmp_path: Path
) -> None:
    model = tiny_interlingua({"llama": reader}, "context")
    model.lora["llama"] = drawn(reader, rank=2).eval()
    model.save_pretrained(tmp_path)
    (payload,) = model.encode_payloads(["Nulnak lives in Tarbek."])
    prompt = reader.prompts.build([Turn("Who?")], context=None, latent="context")
    expected = Receiver.of(model, reader).prefill([prompt], payloads=[payload]).logits_BV
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.trained_state().keys() == {
        key for key in model.trained_state() if not key.startswith("lora.")
    }
    found = []
    for merge in (False, True):
        fresh = Reader.load(llama_folder, name="llama")
        options = ReceiverOptions(merge_lora=merge)
        again = type(model).from_pretrained(tmp_path)
        receiver = Receiver.of(again, fresh, options=options)
        assert not any(weight.requires_grad for weight in fresh.model.parameters())
        found.append(receiver.prefill([prompt], payloads=[payload]).logits_BV)
        with pytest.raises(ConfigError, match=r"low-rank updates \(LoRA\) already; load it again"):
            Receiver.of(loaded, fresh)
        again.save_pretrained(tmp_path / "again")
        if not merge:
            assert Receiver.of(again, fresh).reader is fresh, "the same updates are no others"
    assert torch.equal(found[0], expected)
    torch.testing.assert_close(found[1], expected, atol=1e-4, rtol=1e-4)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        place = Path("lora/llama") / name
        assert (tmp_path / "again" / place).read_bytes() == (tmp_path / place).read_bytes()
    with pytest.raises(ConfigError, match=r"has low-rank updates \(LoRA\) of another model"):
        Receiver.of(tiny_interlingua({"llama": reader}, "context"), reader)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"projections": ("q_porj",)},
            r"no linear layer 'q_porj' for its LoRA; there are mlp.down",
        ),
        ({"layers": 3}, r"lora.layers=3, and it has 2"),
    ],
)
def test_what_a_reader_has_not_is_named(
    reader: Reader, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        ReaderLora.fresh(reader, LoraSettings(**settings))


@pytest.mark.parametrize(
    "wrong",
    [
        *({"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}, {"layers": 0}, {"lr": 0.0}),
        *({"projections": ()}, {"projections": ("",)}),
    ],
    ids=str,
)
def test_settings_outside_their_range_are_refused(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ConfigError, match=f"{name}="):
        LoraSettings(**wrong)


def test_quantised_weights_stay_as_they_are(
    llama_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NF4 on the CPU path of bitsandbytes: gradients reach the updates, and nothing is merged."""
    modules = pytest.importorskip("bitsandbytes").nn.modules
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: False)  # it packs for inference alone
    end = llama_tokenizer.eos_token_id
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "bos_token_id": end, "eos_token_id": end}
    config = LlamaConfig(vocab_size=len(llama_tokenizer), **shape, **heads)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    llama_tokenizer.save_pretrained(tmp_path)
    reader = Reader.load(tmp_path, name="llama", load_in_4bit=True)
    before, digest = logprobs(reader), reader.fingerprint
    lora = ReaderLora.fresh(reader, LoraSettings(rank=4))
    assert torch.equal(logprobs(reader), before)
    prompt = reader.prompts.build([Turn("Who?", "Bob")], context="Nulnak.")
    reader.score([prompt]).gold_N.sum().backward()
    assert all(weight.grad is not None for weight in lora.parameters())
    assert reader.weights_digest() == digest
    with pytest.raises(ConfigError, match=r"not merged into quantised weights"):
        lora.merge()
