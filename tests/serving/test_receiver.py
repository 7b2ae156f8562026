"""The prefill engine gives what transformers gives, token by token, or refuses."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    StaticCache,
)

from latentwire_fast import ops, wire
from latentwire_fast.errors import CheckpointError, ConfigError, PayloadError
from latentwire_fast.models.encoders.base import build_encoder
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.prompts.builder import Prompt, Turn
from latentwire_fast.readers import attention
from latentwire_fast.readers.card import ReaderCard
from latentwire_fast.readers.reader import Reader
from latentwire_fast.registry import BOTTLENECKS, ENCODERS
from latentwire_fast.serving import Prefilled, Receiver, receiver
from latentwire_fast.serving.graphs import PassCache, set_length, write_through
from latentwire_fast.serving.input_buffer import InputBuffer, lay_out
from readers import tiny_model
from runs import deep, soft

LATENTS, D_Z, NEW = 4, 8, 32
CONTEXTS = ["Nulnak lives in Bakrim.", "Fosvun has a red lamp and is 94.", "Selpon is a baker."]
QUESTIONS = ["Where does Nulnak live?", "What?", "What is the job of Selpon, if any?"]
PREFIXES = ["soft", "deep", "both"]
needs_flash = pytest.mark.skipif(
    find_spec("flash_attn") is None or not torch.cuda.is_available(),
    reason="flash_attention_2 needs the package flash-attn and a CUDA device",
)
ATTENTION = ["eager", "sdpa", pytest.param("flash_attention_2", marks=needs_flash)]


def make_model(
    reader: Reader,
    prefix: Any = "soft",
    mode: Literal["context", "pure"] = "context",
    kind: str = "mlp",
    **options: Any,
) -> Interlingua:
    """An untrained model whose prefixes are far from one another.

    Args:
        kind, options: of the adapter of soft tokens.
    """
    encoder = ENCODERS.config("byte", latents=LATENTS, d_z=D_Z, width=16, layers=1, heads=2)
    options |= {"expansion": 2} if kind == "mlp" else {}
    parts = {"soft": soft(kind, **options), "deep": deep(width=16, expansion=2)}
    torch.manual_seed(3)
    model = Interlingua(
        build_encoder(encoder, {}),
        {reader.name: ReaderCard.of(reader)},
        bottleneck=BOTTLENECKS.config("uniform", bits=6, group_size=16),
        attachments=list(parts.values()) if prefix == "both" else [parts[prefix]],
        mode=mode,
    )
    return model.eval()


def random_payloads(model: Interlingua, rows: int = 3, bits: int = 6) -> list[bytes]:
    return model.payloads(torch.randn(rows, LATENTS, D_Z), bits=bits)


@torch.no_grad()
def plain_path(
    model: Interlingua, reader: Reader, payload: bytes, prompt: Prompt, *, new_tokens: int = NEW
) -> tuple[Tensor, list[int]]:
    """First logits and greedy tokens of one row, by transformers alone: no batch, no padding, and
    keys and values put into the cache layer by layer."""
    received = model.reader_inputs(reader.name, model.decode_payloads([payload]))
    at = prompt.latent_at
    assert isinstance(at, int)
    embeds_TD = reader.embedding(torch.tensor(prompt.ids))
    embeds = torch.cat([embeds_TD[:at], received["prefixes"][0], embeds_TD[at:]])[None]
    cache = DynamicCache(config=reader.model.config)
    if (deep := received["deep"]) is not None:
        for number, (keys, values) in enumerate(deep):
            cache.update(keys, values, number)
    output = reader.model(
        inputs_embeds=embeds.to(reader.model.dtype), past_key_values=cache, logits_to_keep=1
    )
    first, ids = output.logits[0, -1], []
    for _ in range(new_tokens):
        ids.append(int(output.logits[0, -1].argmax()))
        if ids[-1] == reader.prompts.eos_id:
            return first, ids[:-1]
        output = reader.model(input_ids=torch.tensor([ids[-1:]]), past_key_values=cache)
    return first, ids


def assert_plain(
    first: Prefilled, model: Interlingua, payloads: Sequence[bytes], prompts: Sequence[Prompt]
) -> None:
    """Each row has the logits and the tokens that it has alone."""
    reader = first._reader
    expected = [
        plain_path(model, reader, payload, prompt)
        for payload, prompt in zip(payloads, prompts, strict=True)
    ]
    logits = torch.stack([row for row, _ in expected])
    largest = float(logits.abs().max())
    torch.testing.assert_close(first.logits_BV, logits, rtol=1e-5, atol=1e-5 * largest)
    assert first.generate(NEW) == [ids for _, ids in expected]


# --- a graph's path without a GPU -----------------------------------------------------------------


class UncapturedPass:
    """A `CapturedPass` that runs its forward again instead of replaying it."""

    def __init__(self, forward: Callable[..., Tensor], batch: Any, *, cache: Any, memory: Any):
        self.cache, self.serial = cache, 0
        self._forward = forward
        self._inputs = InputBuffer(batch.fields, device=torch.device("cpu"))
        self._inputs.fill(batch.values())
        forward(self._inputs.tensors)

    def fill(self, values: dict[str, np.ndarray]) -> None:
        self._inputs.fill(values)

    def replay(self) -> Tensor:
        self.serial += 1
        return self._forward(self._inputs.tensors)


@pytest.fixture
def uncaptured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Receivers take the graph's path, with its buffers and its static cache, on the CPU."""
    monkeypatch.setattr(receiver, "CapturedPass", UncapturedPass)
    monkeypatch.setattr(receiver, "GraphMemory", lambda device: None)
    monkeypatch.setattr(Receiver, "_choose", lambda self, engine: "graph")
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())


@pytest.fixture(params=["eager", "graph"])
def engine(request: pytest.FixtureRequest) -> str:
    if request.param == "graph":
        request.getfixturevalue("uncaptured")
    return request.param


@pytest.fixture(params=ATTENTION)
def attending(
    request: pytest.FixtureRequest, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> Reader:
    """Each tiny reader with each attention implementation."""
    monkeypatch.setattr(reader.model.config, "_attn_implementation_internal", request.param)
    return reader


# --- the same as transformers ---------------------------------------------------------------------


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("prefix", PREFIXES)
def test_logits_and_32_tokens_are_those_of_transformers(attending: Reader, prefix: str) -> None:
    model = make_model(attending, prefix)
    receiver = Receiver.of(model, attending)
    payloads, prompts = random_payloads(model), receiver.prompts(QUESTIONS)
    assert_plain(receiver.prefill(payloads, prompts), model, payloads, prompts)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("prefix", PREFIXES)
def test_one_payload_answers_all_prompts(reader: Reader, prefix: str) -> None:
    model = make_model(reader, prefix)
    receiver = Receiver.of(model, reader)
    payloads, prompts = random_payloads(model, 1), receiver.prompts(QUESTIONS)
    assert_plain(receiver.prefill(payloads, prompts), model, payloads * 3, prompts)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("bits", [16, 8, 6, 4])
def test_every_precision_and_a_batch_of_one(reader: Reader, bits: int) -> None:
    model = make_model(reader)
    receiver = Receiver.of(model, reader)
    payloads, prompts = random_payloads(model, 1, bits), receiver.prompts(QUESTIONS[:1])
    assert_plain(receiver.prefill(payloads, prompts), model, payloads, prompts)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("bits", [16, 8, 6, 4])
@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("prefix", ["soft", "both"])
def test_codes_go_straight_to_soft_tokens_where_nothing_else_wants_the_latent(
    readers: dict[str, Reader],
    prefix: str,
    kind: str,
    bits: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reader, phases = readers["qwen"], []
    model = make_model(reader, prefix, kind=kind, calibration="example", gain=1.5)
    receiver = Receiver.of(model, reader, mark=phases.append)
    payloads, prompts = random_payloads(model, 3, bits), receiver.prompts(QUESTIONS)
    calls: list[str] = []
    for name in ("project_calibrate", "dequantize_project_calibrate"):
        op = getattr(ops, name)
        monkeypatch.setattr(
            ops, name, lambda *a, name=name, op=op, **k: calls.append(name) or op(*a, **k)
        )
    first = receiver.prefill(payloads, prompts)
    fused = prefix == "soft" and kind == "linear" and bits != 16
    assert set(calls) == {"dequantize_project_calibrate" if fused else "project_calibrate"}
    assert ("dequantise" in phases) == (not fused)
    monkeypatch.undo()
    assert_plain(first, model, payloads, prompts)


@pytest.mark.usefixtures("engine")
def test_pure_mode_needs_no_question(reader: Reader) -> None:
    model = make_model(reader, mode="pure")
    receiver = Receiver.of(model, reader)
    payloads = model.encode_payloads(CONTEXTS, QUESTIONS)
    prompts = receiver.prompts(["", "", ""])
    assert_plain(receiver.prefill(payloads, prompts), model, payloads, prompts)


def test_soft_tokens_equal_generate_of_transformers(reader: Reader) -> None:
    model = make_model(reader)
    receiver = Receiver.of(model, reader)
    payload, prompt = random_payloads(model, 1), receiver.prompt(QUESTIONS[0])
    soft = model.prefix(reader.name, model.decode_payloads(payload))
    ids = reader.embedding(torch.tensor(prompt.ids))[None]
    embeds = torch.cat([ids[:, : prompt.latent_at], soft, ids[:, prompt.latent_at :]], 1)
    out = reader.model.generate(
        inputs_embeds=embeds.detach(),
        attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=reader.pad_id,
    )[0].tolist()
    eos = reader.prompts.eos_id
    expected = out[: out.index(eos)] if eos in out else out
    assert receiver.generate(payload, [prompt]) == [expected]


def test_it_equals_the_readers_own_path(reader: Reader) -> None:
    model = make_model(reader, "both")
    receiver = Receiver.of(model, reader)
    payloads, prompts = random_payloads(model), receiver.prompts(QUESTIONS)
    received = model.reader_inputs(reader.name, model.decode_payloads(payloads))
    expected = reader.first_logits(prompts, **received)
    torch.testing.assert_close(
        receiver.prefill(payloads, prompts).logits_BV, expected, rtol=1e-5, atol=1e-4
    )


@pytest.mark.usefixtures("engine")
def test_text_is_read_by_the_same_engine(reader: Reader) -> None:
    receiver = Receiver.of(make_model(reader, "both"), reader)
    prompts = [
        reader.prompts.build([Turn(question)], context=context)
        for question, context in zip(QUESTIONS, CONTEXTS, strict=True)
    ]
    first = receiver.read(prompts)
    expected = reader.first_logits(prompts)
    torch.testing.assert_close(first.logits_BV, expected, rtol=1e-5, atol=1e-4)
    assert first.generate(12) == reader.generate(prompts)


def test_compiled_backbone(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced by dynamo, which makes no mask; what inductor makes of it is torch's business."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: compile_(*a, **k, backend="eager"))
    model = make_model(reader)
    receiver = Receiver.of(model, reader, engine="compile")
    payloads, prompts = random_payloads(model), receiver.prompts(QUESTIONS)
    first = receiver.prefill(payloads, prompts)
    eager = Receiver.of(model, reader, engine="eager").prefill(payloads, prompts)
    torch.testing.assert_close(first.logits_BV, eager.logits_BV, rtol=1e-5, atol=1e-4)
    torch._dynamo.reset()


def test_a_compiled_backbone_serves_all_lengths_and_never_runs_uncompiled(
    readers: dict[str, Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = readers["llama"]
    compile_, graphs = torch.compile, []

    def backend(module: Any, _inputs: Any) -> Any:
        graphs.append(module)
        return module.forward

    monkeypatch.setattr(torch, "compile", lambda *a, **k: compile_(*a, **k, backend=backend))
    torch._dynamo.reset()
    receiver = Receiver.of(make_model(reader), reader, engine="compile")
    texts = [
        reader.prompts.build([Turn("Where?")], context="He lives there. " * n) for n in (1, 4, 9, 2)
    ]
    for prompt in texts:
        receiver.read([prompt])
    assert len(graphs) == 1
    for rows in (2, 3, 4):
        receiver.read(texts[:rows])
    assert len(graphs) == 2
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=1):
        receiver.read(texts[:1])
        with pytest.raises(Exception, match="recompile_limit"):
            receiver.read(texts[:2])
    torch._dynamo.reset()


def test_padding_stays_within_a_table_of_positions(
    readers: dict[str, Reader], monkeypatch: pytest.MonkeyPatch, uncaptured: None
) -> None:
    """GPT-2 looks positions up in a table, and its layers have another name."""
    tokenizer = readers["llama"].tokenizer
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=46,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    reader = Reader(GPT2LMHeadModel(config).eval(), tokenizer, name="gpt2")
    model = make_model(reader, "both")
    receiver = Receiver.of(model, reader, new_tokens=1)
    positions = 46 - LATENTS - 1
    short = receiver.prompts(["Who?"])[0]
    prompt = Prompt([*short.ids, *short.ids[-1:] * (positions - LATENTS - len(short.ids))],
                    latent_at=short.latent_at)  # fmt: skip
    payloads = random_payloads(model, 1)
    first = receiver.prefill(payloads, [prompt])
    assert first.positions == 46
    expected, ids = plain_path(model, reader, payloads[0], prompt, new_tokens=1)
    torch.testing.assert_close(first.logits_BV[0], expected, rtol=1e-5, atol=1e-5)
    assert first.generate(1) == [ids]


def test_prompts_together_are_the_prompts_one_by_one(reader: Reader) -> None:
    for mode in ("context", "pure"):
        receiver = Receiver.of(make_model(reader, mode=mode), reader)  # type: ignore[arg-type]
        assert receiver.prompts(QUESTIONS) == [receiver.prompt(q) for q in QUESTIONS]


# --- what a prefill leaves ------------------------------------------------------------------------


@pytest.mark.usefixtures("engine")
def test_decoding_twice_starts_from_the_prompt_both_times(reader: Reader) -> None:
    model = make_model(reader, "deep")
    receiver = Receiver.of(model, reader)
    first = receiver.prefill(random_payloads(model), receiver.prompts(QUESTIONS))
    once = first.generate(9)
    assert first.generate(9) == once
    assert int(first.cache.get_seq_length()) == first.positions


@pytest.mark.usefixtures("uncaptured")
def test_a_graphs_cache_is_static_and_refused_once_overwritten(reader: Reader) -> None:
    model = make_model(reader)
    receiver = Receiver.of(model, reader)
    prompts = receiver.prompts(QUESTIONS)
    old = receiver.prefill(random_payloads(model), prompts)
    assert isinstance(old.cache, StaticCache)
    old_logits = old.logits_BV.clone()
    new = receiver.prefill(random_payloads(model), prompts)
    assert new.generate(4)
    with pytest.raises(ConfigError, match="overwritten"):
        old.generate(4)
    assert torch.equal(old.logits_BV, old_logits)


@pytest.mark.usefixtures("engine")
def test_more_tokens_than_fit_are_refused(reader: Reader) -> None:
    model = make_model(reader)
    receiver = Receiver.of(model, reader, new_tokens=3)
    first = receiver.prefill(random_payloads(model), receiver.prompts(QUESTIONS))
    assert len(first.generate(3)) == 3
    for wrong in (0, 100):
        with pytest.raises(ConfigError, match=f"max_new_tokens={wrong}"):
            first.generate(wrong)


@pytest.mark.usefixtures("engine")
def test_a_prompt_that_exceeds_the_readers_positions_is_refused(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(reader, "both")
    receiver = Receiver.of(model, reader)
    monkeypatch.setattr(reader.model.config, "max_position_embeddings", LATENTS + 20)
    with pytest.raises(ConfigError, match="exceed the 24 positions"):
        receiver.prefill(random_payloads(model), receiver.prompts(QUESTIONS))


# --- what is refused ------------------------------------------------------------------------------


def resealed(payload: bytes, change: Callable[[bytearray], None]) -> bytes:
    """The payload with a change and a CRC that fits it."""
    changed = bytearray(payload)
    change(changed)
    changed[12:16] = bytes(4)
    changed[12:16] = struct.pack("<I", zlib.crc32(changed))
    return bytes(changed)


def set_byte(index: int, value: int) -> Callable[[bytearray], None]:
    def change(payload: bytearray) -> None:
        payload[index] = value

    return change


def set_first_code_to_minus_32(payload: bytearray) -> None:
    """Of 6 bits in groups of 16: 8 bytes of low nibbles, then the high pairs of bits."""
    payload[16] &= 0xF0
    payload[24] = payload[24] & 0xFC | 2


@pytest.mark.usefixtures("engine")
class TestRefusals:
    @pytest.fixture
    def made(self, reader: Reader) -> tuple[Receiver, Interlingua]:
        model = make_model(reader)
        return Receiver.of(model, reader), model

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda p: b"", "payload 1: 0 bytes are fewer"),
            (lambda p: p[:-1], "payload 1: .* it was cut short"),
            (lambda p: p[:-1] + b"\x00", "payload 1: the CRC-32"),
            (lambda p: resealed(p, set_byte(10, p[10] ^ 1)), "written by model"),
            (lambda p: resealed(p, set_first_code_to_minus_32), "which no latent is packed to"),
            (lambda p: resealed(p, set_byte(len(p) - 1, 0x7C)), "payload 1: the scale"),
        ],
        ids=["nothing", "cut", "bytes", "another model", "code", "infinite scale"],
    )
    def test_payloads_that_no_encoder_of_this_model_sent(
        self, made: tuple[Receiver, Interlingua], damage: Callable[[bytes], bytes], message: str
    ) -> None:
        receiver, model = made
        good = random_payloads(model)
        with pytest.raises(PayloadError, match=message):
            receiver.prefill([good[0], damage(good[1]), good[2]], receiver.prompts(QUESTIONS))
        assert receiver.prefill(good, receiver.prompts(QUESTIONS)).generate(2)

    def test_payloads_of_another_shape_or_of_two_precisions(
        self, made: tuple[Receiver, Interlingua]
    ) -> None:
        receiver, model = made
        other = wire.pack(
            torch.randn(LATENTS + 1, D_Z), bits=6, group_size=16, fingerprint=model.fingerprint
        )
        prompts = receiver.prompts(QUESTIONS[:2])
        with pytest.raises(PayloadError, match=r"payload 1: it holds a latent \(5, 8\)"):
            receiver.prefill([*random_payloads(model, 1), other], prompts)
        mixed = random_payloads(model, 1, 6) + random_payloads(model, 1, 8)
        with pytest.raises(PayloadError, match="payload 1: it has 8 bits"):
            receiver.prefill(mixed, prompts)
        with pytest.raises(PayloadError, match="no payloads"):
            receiver.prefill([], prompts)

    def test_prompts_that_do_not_fit(self, made: tuple[Receiver, Interlingua]) -> None:
        receiver, model = made
        payloads = random_payloads(model, 2)
        text = receiver.reader.prompts.build([Turn("Who?")], context="")
        with pytest.raises(ConfigError, match="2 payloads for 3 prompts"):
            receiver.prefill(payloads, receiver.prompts(QUESTIONS))
        with pytest.raises(ConfigError, match="prompt 1 was built as text"):
            receiver.prefill(payloads, [receiver.prompt("Who?"), text])
        with pytest.raises(ConfigError, match="prompt 0 was built with `latent=`"):
            receiver.read([receiver.prompt("Who?")])
        with pytest.raises(ConfigError, match="no prompts"):
            receiver.read([])
        with pytest.raises(ConfigError, match="prompt 0 is empty"):
            receiver.read([Prompt()])
        for at in (-1, 3):
            with pytest.raises(ConfigError, match=f"prompt 0 has its latent at {at} of 2 tokens"):
                receiver.prefill(payloads[:1], [Prompt([1, 2], latent_at=at)])
        vocabulary = receiver.reader.embedding.num_embeddings
        with pytest.raises(ConfigError, match=f"has token {vocabulary}, and reader"):
            receiver.read([Prompt([1]), Prompt([2, vocabulary])])


def test_a_reader_with_other_weights_is_refused(reader: Reader) -> None:
    model = make_model(reader)
    architecture = "llama" if reader.name == "llama" else "qwen2"
    weights = tiny_model(architecture, reader.tokenizer, seed=9)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="other weights"):
        Receiver.of(model, Reader(weights, reader.tokenizer, name=reader.name))


def test_parts_and_layers_in_the_wrong_place_are_refused(readers: dict[str, Reader]) -> None:
    reader = readers["llama"]
    adapter = make_model(reader).parts("llama")["soft"]
    shape = {"latents": LATENTS, "d_z": D_Z, "fingerprint": 0}
    with pytest.raises(ConfigError, match="needs an adapter, a deep prefix, or both"):
        Receiver(reader, None, **shape)
    with pytest.raises(ConfigError, match="a graph needs all of reader 'llama' on one CUDA device"):
        Receiver(reader, adapter, **shape, engine="graph")
    with pytest.raises(ConfigError, match="the adapter is on meta"):
        Receiver(reader, adapter.to("meta"), **shape)
    lost = Reader(tiny_model("llama", reader.tokenizer), reader.tokenizer, name="llama")  # type: ignore[arg-type]
    lost.model.get_decoder().layers[1].to("meta")
    with pytest.raises(ConfigError, match="layer 1 is on 'meta'"):
        Receiver(lost, adapter, **shape)


def test_readers_with_more_than_causal_attention_are_refused(readers: dict[str, Reader]) -> None:
    """A window would count the padding; what replaces sdpa in a graph knows no soft cap."""
    whole = readers["qwen"]
    settings = whole.model.config.to_dict() | {"use_sliding_window": True, "sliding_window": 6}
    del settings["layer_types"]
    sliding = Qwen2ForCausalLM(Qwen2Config(**settings | {"max_window_layers": 1}))
    reader = Reader(sliding, whole.tokenizer, name="qwen")
    model = make_model(whole)
    with pytest.raises(ConfigError, match="layer 1 of reader 'qwen' keeps its past in a Dynamic"):
        Receiver(reader, model.parts("qwen")["soft"], latents=LATENTS, d_z=D_Z, fingerprint=0)
    query = torch.randn(1, 2, 3, 4)
    with pytest.raises(ConfigError, match="wants attention with softcap"):
        attention.causal_attention(whole.model, query, query, query, None, softcap=50.0)


# --- graphs and their parts -----------------------------------------------------------------------


@pytest.mark.usefixtures("uncaptured")
def test_a_steady_stream_of_requests_captures_once_per_shape(reader: Reader) -> None:
    model = make_model(reader)
    receiver = Receiver.of(model, reader, max_graphs=2)
    batches = [receiver.prompts(QUESTIONS[:rows]) for rows in (1, 3)]
    for _ in range(3):
        for prompts in batches:
            payloads = random_payloads(model, len(prompts))
            assert_plain(receiver.prefill(payloads, prompts), model, payloads, prompts)
    assert receiver.passes.captures == 2
    receiver.prefill(random_payloads(model, 1, bits=8), batches[0])
    assert receiver.passes.captures == 3
    assert [shape.rows for shape in receiver.passes.shapes] == [3, 1]


def test_the_pass_cache_drops_what_was_not_used_for_longest() -> None:
    made: list[Any] = []

    def get(cache: PassCache, shape: Any) -> Any:
        return cache.get(shape, lambda: made.append(shape) or object())  # type: ignore[return-value]

    cache = PassCache(2)
    a = get(cache, "a")
    get(cache, "b")
    assert get(cache, "a") is a
    get(cache, "c")
    assert list(cache.shapes) == ["a", "c"]
    assert get(cache, "a") is a
    get(cache, "b")
    assert made == ["a", "b", "c", "b"]


@torch.no_grad()
def test_writing_through_fills_a_static_cache(reader: Reader) -> None:
    model = reader.model
    ids = torch.randint(5, 50, (2, 9))
    expected = model(input_ids=ids).logits
    geometry = reader.kv_geometry
    static = StaticCache(config=model.config, max_cache_len=16)
    device = torch.device("cpu")
    static.early_initialization(2, geometry.heads, geometry.head_width, model.dtype, device)
    parts = []
    for start, end in ((0, 4), (4, 7)):
        cache = write_through(static, length=start)
        assert cache.layers[0].get_max_length() == 16
        positions = torch.arange(start, end)[None]
        parts.append(
            model(input_ids=ids[:, start:end], past_key_values=cache, position_ids=positions).logits
        )
        assert cache.get_seq_length() == end
    set_length(static, 7)
    parts.append(
        model(
            input_ids=ids[:, 7:], past_key_values=static, position_ids=torch.tensor([[7, 8]])
        ).logits
    )
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-5, atol=1e-4)


def test_a_layout_is_what_collate_makes(reader: Reader) -> None:
    receiver = Receiver.of(make_model(reader), reader)
    prompts = receiver.prompts(QUESTIONS)
    soft = torch.randn(3, LATENTS, reader.d_model)
    batch = reader.collate(prompts, prefixes=soft)
    layout = lay_out(prompts, soft_tokens=LATENTS, pad_id=reader.pad_id)
    assert np.array_equal(layout.ids_BT, batch.ids_BT.numpy())
    assert np.array_equal(layout.lengths_B, batch.lengths_B.numpy())
    rows, columns = batch.places_P2.unbind(1)
    assert np.array_equal(np.argwhere(layout.slots_BT >= 0), batch.places_P2.numpy())
    assert layout.slots_BT[rows, columns].tolist() == [*range(LATENTS)] * 3
    wider = lay_out(prompts, soft_tokens=LATENTS, pad_id=reader.pad_id, multiple=64)
    assert wider.width == 64
    assert (wider.ids_BT[:, layout.width :] == reader.pad_id).all()


def test_an_input_buffer_holds_every_field() -> None:
    fields = {
        "odd": (torch.uint8, (3, 5)),
        "none": (torch.float16, (2, 0)),
        "ids": (torch.int64, (2, 2)),
    }
    buffer = InputBuffer(fields, device=torch.device("cpu"))
    values = {
        "odd": np.arange(15, dtype=np.uint8).reshape(3, 5),
        "none": np.zeros((2, 0), np.float16),
        "ids": np.array([[1, -2], [3, 2**40]]),
    }
    buffer.fill(values)
    for name, (dtype, _) in fields.items():
        assert buffer.tensors[name].dtype == dtype
        assert np.array_equal(buffer.tensors[name].numpy(), values[name])
    assert buffer.tensors["ids"].data_ptr() % 16 == buffer.tensors["odd"].data_ptr() % 16


@pytest.mark.parametrize(("past", "new"), [(0, 6), (4, 3), (5, 1)])
@torch.no_grad()
def test_attention_without_a_mask_is_causal(reader: Reader, past: int, new: int) -> None:
    model = reader.model
    ids = torch.randint(5, 50, (2, past + new))

    def read() -> Tensor:
        cache = DynamicCache(config=model.config)
        if past:
            model(input_ids=ids[:, :past], past_key_values=cache)
        return model(input_ids=ids[:, past:], past_key_values=cache).logits

    expected = read()
    own = model.config._attn_implementation
    with attention.mask_free(model) as replaced:
        assert replaced
        assert model.config._attn_implementation != own
        found = read()
    assert model.config._attn_implementation == own
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (5, 5), (3, 8)])
def test_the_mask_of_eager_attention(queries: int, keys: int) -> None:
    device = torch.device("cpu")
    mask = attention.causal_mask(queries, keys, dtype=torch.float16, device=device)[0, 0]
    assert mask.dtype == torch.float16
    seen = [keys - queries + i + 1 for i in range(queries)]
    assert (mask == 0).sum(1).tolist() == seen
    assert mask.min() == (0 if queries == 1 else torch.finfo(torch.float16).min)


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.fixture
def on_gpu(llama_folder: Path, qwen_folder: Path) -> Iterator[Callable[..., Reader]]:
    """Loads a tiny reader onto the GPU, in fp32 as it is."""

    def load(name: str, **options: Any) -> Reader:
        folder = {"llama": llama_folder, "qwen": qwen_folder}[name]
        return Reader.load(folder, name=name, **{"device": "cuda:0", **options})

    yield load
    torch.cuda.empty_cache()


def eager_and_graph(
    reader: Reader, prefix: str, **adapter: Any
) -> tuple[Interlingua, Receiver, Receiver]:
    model = make_model(reader, prefix, **adapter).to(reader.device)
    engines = [Receiver.of(model, reader, engine=engine) for engine in ("eager", "graph")]
    return model, engines[0], engines[1]


def assert_same(found: Prefilled, expected: Prefilled, tokens: int = NEW) -> None:
    largest = float(expected.logits_BV.abs().max())
    torch.testing.assert_close(
        found.logits_BV.float(), expected.logits_BV.float(), rtol=1e-5, atol=1e-5 * largest
    )
    assert found.generate(tokens) == expected.generate(tokens)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("prefix", "kind"), [("soft", "linear"), *((prefix, "mlp") for prefix in PREFIXES)]
)
@pytest.mark.parametrize("name", ["llama", "qwen"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_graph_equals_eager(
    on_gpu: Callable[..., Reader], name: str, prefix: str, kind: str, implementation: str
) -> None:
    reader = on_gpu(name, attn_implementation=implementation)
    model, eager, graph = eager_and_graph(reader, prefix, kind=kind)
    assert Receiver.of(model, reader).engine == "graph"
    prompts = graph.prompts(QUESTIONS)
    for _ in range(3):
        payloads = random_payloads(model)
        assert_same(graph.prefill(payloads, prompts), eager.prefill(payloads, prompts))
    assert graph.passes.captures == 1
    for rows in (1, 2, 1, 3):
        payloads = random_payloads(model, rows)
        one, other = (r.prefill(payloads, prompts[:rows]) for r in (graph, eager))
        assert_same(one, other, tokens=4)
    assert graph.passes.captures <= 3


@pytest.mark.gpu
@pytest.mark.skipif(find_spec("flash_attn") is None, reason="flash-attn is not installed")
@pytest.mark.parametrize("prefix", PREFIXES)
def test_graph_with_flash_attention_2(on_gpu: Callable[..., Reader], prefix: str) -> None:
    reader = on_gpu("llama", attn_implementation="flash_attention_2", dtype=torch.bfloat16)
    model, eager, graph = eager_and_graph(reader, prefix)
    payloads, prompts = random_payloads(model), graph.prompts(QUESTIONS)
    found, expected = (r.prefill(payloads, prompts).logits_BV for r in (graph, eager))
    torch.testing.assert_close(found, expected, rtol=3e-2, atol=3e-2 * float(expected.abs().max()))


@pytest.mark.gpu
@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("prefix", PREFIXES)
def test_graph_with_a_4_bit_reader(on_gpu: Callable[..., Reader], prefix: str) -> None:
    reader = on_gpu("llama", device=None, load_in_4bit=True, dtype=torch.bfloat16)
    model, eager, graph = eager_and_graph(reader, prefix)
    payloads, prompts = random_payloads(model), graph.prompts(QUESTIONS)
    found, expected = (r.prefill(payloads, prompts).logits_BV for r in (graph, eager))
    torch.testing.assert_close(found, expected, rtol=3e-2, atol=3e-2 * float(expected.abs().max()))


@pytest.mark.gpu
@pytest.mark.parametrize("prefix", PREFIXES)
def test_requests_that_overtake_the_gpu(on_gpu: Callable[..., Reader], prefix: str) -> None:
    """The GPU is busy while requests queue up, on two streams: no input may be overwritten before
    it was read, and no result before it was copied."""
    reader = on_gpu("llama")
    model, eager, graph = eager_and_graph(reader, prefix)
    prompts = graph.prompts(QUESTIONS)
    batches = [random_payloads(model) for _ in range(4)]
    expected = [eager.prefill(payloads, prompts).logits_BV for payloads in batches]
    graph.prefill(batches[0], prompts)
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    found = []
    for number, payloads in enumerate(batches):
        with torch.cuda.stream(streams[number % 2]):
            torch.cuda._sleep(20_000_000)
            found.append(graph.prefill(payloads, prompts).logits_BV)
    torch.cuda.synchronize()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


def halves(model: PreTrainedModel, device: str) -> None:
    """The first half of the layers stays on the CPU, the rest goes to `device`."""
    from accelerate import dispatch_model

    layers = model.config.num_hidden_layers
    device_map: dict[str, Any] = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu"}
    device_map |= {f"model.layers.{i}": "cpu" for i in range(layers // 2)}
    device_map |= {f"model.layers.{i}": device for i in range(layers // 2, layers)}
    device_map |= {"model.norm": device, "lm_head": "cpu"}  # tied to the embeddings
    dispatch_model(
        model, device_map, main_device="cpu", skip_keys=model._skip_keys_device_placement
    )


@pytest.mark.gpu
def test_two_shapes_on_two_streams(on_gpu: Callable[..., Reader]) -> None:
    """Their graphs share memory: each replay waits for the other's."""
    reader = on_gpu("llama")
    model, eager, graph = eager_and_graph(reader, "soft")
    prompts = graph.prompts(QUESTIONS)
    batches = [random_payloads(model, rows) for rows in (3, 1) * 4]
    expected = [eager.prefill(p, prompts[: len(p)]).logits_BV for p in batches]
    for payloads in batches[:2]:
        graph.prefill(payloads, prompts[: len(payloads)])
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    found = []
    for number, payloads in enumerate(batches):
        with torch.cuda.stream(streams[number % 2]):
            torch.cuda._sleep(20_000_000 if number % 2 == 0 else 1_000)
            found.append(graph.prefill(payloads, prompts[: len(payloads)]).logits_BV)
    torch.cuda.synchronize()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


@pytest.mark.gpu
def test_a_capture_that_fails_costs_itself_alone(
    on_gpu: Callable[..., Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = on_gpu("llama")
    model, eager, graph = eager_and_graph(reader, "soft")
    payloads, prompts = random_payloads(model), graph.prompts(QUESTIONS)
    stream = torch.cuda.current_stream()
    head, right = reader.head, reader.head.forward

    def synchronising(hidden_BD: Tensor) -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            hidden_BD.sum().item()
        return right(hidden_BD)

    with monkeypatch.context() as patch:
        patch.setattr(head, "forward", synchronising)
        with pytest.raises(RuntimeError):
            graph.prefill(payloads, prompts)
    assert torch.cuda.current_stream() == stream
    torch.randn(4, device="cuda:0").uniform_()
    assert_same(graph.prefill(payloads, prompts), eager.prefill(payloads, prompts))


@pytest.mark.gpu
@pytest.mark.parametrize("prefix", PREFIXES)
def test_layers_on_two_devices(readers: dict[str, Reader], prefix: str) -> None:
    whole = readers["llama"]
    model = make_model(whole, prefix)
    split = tiny_model("llama", whole.tokenizer)  # type: ignore[arg-type]
    split.load_state_dict(whole.model.state_dict())
    reader = Reader(split, whole.tokenizer, name="llama")
    halves(split, "cuda:0")
    receiver = Receiver.of(model, reader)
    assert receiver.engine == "eager"
    payloads, prompts = random_payloads(model), receiver.prompts(QUESTIONS)
    first = receiver.prefill(payloads, prompts)
    expected = Receiver.of(model, whole).prefill(payloads, prompts)
    torch.testing.assert_close(first.logits_BV.cpu(), expected.logits_BV, rtol=1e-4, atol=1e-3)
    assert len(first.generate(4)) == 3
