"""Weights that are not where they are computed with, or not in a dtype of torch's (F29)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from latentwire_fast.errors import ConfigError
from latentwire_fast.prompts.builder import Prompt, Turn
from latentwire_fast.readers.reader import Reader
from latentwire_fast.readers.weights import is_offloaded, weights_digest
from latentwire_fast.serving import Receiver
from latentwire_fast.training.guards import FrozenGuard
from readers import tiny_interlingua, tiny_model

OFFLOADED: dict[str, Any] = {
    "all on a disk": {"": "disk"},
    "a layer on a disk": {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    },
}


def asked(reader: Reader, name: str = "Nulnak") -> list[Prompt]:
    turns = [Turn("Where?"), Turn(f"Who is {name}?")]
    return [reader.prompts.build([t], context=f"{name} is old.") for t in turns]


@pytest.fixture(params=OFFLOADED)
def offloaded(request: pytest.FixtureRequest, llama_folder: Path) -> Reader:
    return Reader.load(llama_folder, name="llama", device_map=OFFLOADED[request.param])


# --- offloaded weights --------------------------------------------------------------------------


def test_an_offloaded_reader_has_the_same_fingerprint(
    offloaded: Reader, readers: dict[str, Reader]
) -> None:
    assert is_offloaded(offloaded.model)
    assert not is_offloaded(readers["llama"].model)
    assert offloaded.fingerprint == readers["llama"].fingerprint
    assert is_offloaded(offloaded.model)  # reading did not bring them in
    FrozenGuard({"llama": offloaded.model}).verify()


def test_an_offloaded_reader_reads_the_same(offloaded: Reader, readers: dict[str, Reader]) -> None:
    whole = readers["llama"]
    assert offloaded.device == whole.device
    assert offloaded.head_weight is offloaded.embedding.weight
    assert torch.equal(offloaded.head_weight, whole.head_weight)
    assert offloaded.embedding_rms == whole.embedding_rms
    found, expected = offloaded.kv_geometry, whole.kv_geometry
    assert replace(found, rms=()) == replace(expected, rms=())
    # Where weights lie in memory decides how their products are rounded.
    torch.testing.assert_close(torch.tensor(found.rms), torch.tensor(expected.rms))
    model = tiny_interlingua(readers, "context")
    payloads = model.encode_payloads(["Nulnak is old.", "Nulnak lives in Oslo."])
    prompts = whole.prompts.build_many([Turn("Where?"), Turn("Who?")], latent="context")
    found, expected = (
        Receiver.of(model, reader).generate(prompts, payloads=payloads)
        for reader in (offloaded, whole)
    )
    assert found == expected


def test_gradients_flow_through_offloaded_layers(
    offloaded: Reader, readers: dict[str, Reader]
) -> None:
    gradients = []
    for reader in (offloaded, readers["llama"]):
        prefix = torch.randn(2, 3, reader.d_model, generator=torch.Generator().manual_seed(1))
        prefix.requires_grad_()
        prompts = reader.prompts.build_many(
            [Turn("Where?", "Oslo"), Turn("Who?", "Nulnak")], latent="context"
        )
        reader.score(prompts, prefixes=prefix).gold_N.sum().backward()
        gradients.append(prefix.grad)
    assert gradients[0] is not None
    torch.testing.assert_close(*gradients)


def test_an_offloaded_reader_keeps_its_dtype(offloaded: Reader) -> None:
    with pytest.raises(ConfigError, match="which stay in their dtype; leave --dtype away"):
        offloaded.compute_in(torch.bfloat16)


def test_computing_in_bf16_is_as_loading_in_it(llama_folder: Path) -> None:
    """Rotary frequencies stay fp32: rounded, keys far into a text stand elsewhere."""
    loaded = Reader.load(llama_folder, name="loaded", dtype=torch.bfloat16)
    cast = Reader.load(llama_folder, name="cast")
    cast.compute_in(torch.bfloat16)
    assert {w.dtype for w in cast.model.parameters()} == {torch.bfloat16}
    buffers = dict(cast.model.named_buffers())
    assert any("inv_freq" in name for name in buffers)
    for name, value in loaded.model.named_buffers():
        assert buffers[name].dtype == value.dtype == torch.float32
        assert torch.equal(buffers[name], value)
    (ids,) = [loaded.prompts.text_ids("Nulnak works as a baker. " * 30)]
    logits = [reader.model(torch.tensor([ids])).logits for reader in (loaded, cast)]
    assert torch.equal(*logits)


def test_an_untied_head_on_a_disk_comes_back(
    tmp_path: Path, llama_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny_model("llama", llama_tokenizer)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.save_pretrained(tmp_path)
    llama_tokenizer.save_pretrained(tmp_path)
    reader = Reader.load(tmp_path, name="untied", device_map={"": "disk"})
    assert torch.equal(reader.head_weight, model.lm_head.weight)
    assert reader.fingerprint == weights_digest(model)
    assert is_offloaded(reader.model)


# --- 4-bit weights ------------------------------------------------------------------------------


@pytest.fixture
def nf4(llama_folder: Path) -> Reader:
    pytest.importorskip("bitsandbytes")
    return Reader.load(llama_folder, name="llama", load_in_4bit=True)


def test_a_4_bit_reader_reads_as_its_unpacked_weights(nf4: Reader, llama_folder: Path) -> None:
    assert nf4.model.is_quantized
    functional = pytest.importorskip("bitsandbytes.functional")
    plain = Reader.load(llama_folder, name="llama")
    for name, module in nf4.model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            assert module.weight.dtype == torch.uint8
            unpacked = functional.dequantize_4bit(module.weight.data, state)
            plain.model.get_submodule(name).weight.data.copy_(unpacked)
    prompts = asked(nf4)
    ours, theirs = (Receiver.for_text(reader) for reader in (nf4, plain))
    torch.testing.assert_close(
        ours.prefill(prompts).logits_BV, theirs.prefill(prompts).logits_BV, rtol=1e-4, atol=1e-4
    )
    assert ours.generate(prompts) == theirs.generate(prompts)


def test_gradients_flow_through_4_bit_weights_after_reading(nf4: Reader) -> None:
    """A CPU with AVX-512 BF16 would have repacked the weights in the first pass."""
    before = nf4.fingerprint
    Receiver.for_text(nf4).generate(asked(nf4))
    prefix = torch.randn(1, 3, nf4.d_model, requires_grad=True)
    prompts = nf4.prompts.build_many([Turn("Where?", "Oslo")], latent="context")
    nf4.score(prompts, prefixes=prefix).gold_N.sum().backward()
    assert prefix.grad is not None
    assert float(prefix.grad.abs().max()) > 0
    assert nf4.weights_digest() == before


def test_the_scales_are_part_of_the_fingerprint(nf4: Reader, llama_folder: Path) -> None:
    again = Reader.load(llama_folder, name="llama", load_in_4bit=True, device="cpu")
    assert again.fingerprint == nf4.fingerprint
    again.model.model.layers[0].mlp.up_proj.weight.quant_state.absmax *= 2
    assert again.weights_digest() != nf4.fingerprint
    with pytest.raises(ConfigError, match="quantised weights"):
        again.compute_in(torch.bfloat16)
