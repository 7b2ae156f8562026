"""The receiver gives what transformers gives, token by token, or refuses."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    PreTrainedModel,
    StaticCache,
)

from latentwire_fast import ops, wire
from latentwire_fast.errors import CheckpointError, ConfigError, DataError, PayloadError
from latentwire_fast.models.attachments.soft import SoftPrompt
from latentwire_fast.models.bottlenecks.uniform import UniformQuantizer
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.prompts.builder import Prompt, Turn
from latentwire_fast.readers import attention
from latentwire_fast.readers.decoding import DecodeOptions
from latentwire_fast.readers.reader import Reader
from latentwire_fast.serving import (
    PayloadKind,
    Prefilled,
    Receiver,
    ReceiverOptions,
)
from latentwire_fast.serving.buckets import row_bucket, width_bucket
from latentwire_fast.serving.input_buffer import InputBuffer, lay_out
from latentwire_fast.serving.pass_cache import PassCache
from latentwire_fast.serving.static_cache import set_length, write_through
from readers import tiny_model
from receiving import D_Z, LATENTS, asking, at_most, gpt2_reader, make_model, random_payloads

NEW = 32
CONTEXTS = ["Nulnak lives in Bakrim.", "Fosvun has a red lamp and is 94.", "Selpon is a baker."]
QUESTIONS = ["Where does Nulnak live?", "What?", "What is the job of Selpon, if any?"]
PREFIXES = ["soft", "deep", "both"]
needs_flash = pytest.mark.skipif(
    find_spec("flash_attn") is None or not torch.cuda.is_available(),
    reason="flash_attention_2 needs the package flash-attn and a CUDA device",
)
ATTENTION = ["eager", "sdpa", pytest.param("flash_attention_2", marks=needs_flash)]


@torch.no_grad()
def plain_path(
    model: Interlingua, reader: Reader, payload: bytes, prompt: Prompt, *, new_tokens: int = NEW
) -> tuple[Tensor, list[int]]:
    """First logits and greedy tokens of one row, by transformers alone: no batch, no padding, and
    keys and values put into the cache layer by layer."""
    reader_inputs = model.reader_inputs(reader.name, model.decode_payloads([payload]))
    at = prompt.latent_at
    assert isinstance(at, int)
    embeds_TD = reader.embedding(torch.tensor(prompt.ids))
    embeds = torch.cat([embeds_TD[:at], reader_inputs["prefixes"][0], embeds_TD[at:]])[None]
    cache = DynamicCache(config=reader.model.config)
    if (deep := reader_inputs["deep"]) is not None:
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
    first: Prefilled,
    model: Interlingua,
    payloads: Sequence[bytes],
    prompts: Sequence[Prompt],
    tokens: int = NEW,
) -> None:
    """Each row has the logits and the tokens that it has alone."""
    reader = first._reader
    expected = [
        plain_path(model, reader, payload, prompt, new_tokens=tokens)
        for payload, prompt in zip(payloads, prompts, strict=True)
    ]
    logits = torch.stack([row for row, _ in expected])
    largest = float(logits.abs().max())
    torch.testing.assert_close(first.logits_BV, logits, rtol=1e-5, atol=1e-5 * largest)
    assert first.generate(at_most(tokens)) == [ids for _, ids in expected]


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
    payloads, prompts = random_payloads(model), asking(attending, QUESTIONS)
    assert_plain(receiver.prefill(prompts, payloads=payloads), model, payloads, prompts)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("prefix", PREFIXES)
def test_one_payload_answers_all_prompts(reader: Reader, prefix: str) -> None:
    model = make_model(reader, prefix)
    receiver = Receiver.of(model, reader)
    payloads, prompts = random_payloads(model, 1), asking(reader, QUESTIONS)
    assert_plain(receiver.prefill(prompts, payloads=payloads), model, payloads * 3, prompts)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("bits", [16, 8, 6, 4])
def test_every_precision_and_a_batch_of_one(reader: Reader, bits: int) -> None:
    model = make_model(reader)
    receiver = Receiver.of(model, reader)
    payloads, prompts = random_payloads(model, 1, bits), asking(reader, QUESTIONS[:1])
    assert_plain(receiver.prefill(prompts, payloads=payloads), model, payloads, prompts)


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
    receiver = Receiver.of(model, reader, options=ReceiverOptions(mark=phases.append))
    payloads, prompts = random_payloads(model, 3, bits), asking(reader, QUESTIONS)
    calls: list[str] = []
    with monkeypatch.context() as patch:
        for name in ("project_calibrate", "dequantize_project_calibrate"):
            op = getattr(ops, name)
            patch.setattr(
                ops, name, lambda *a, name=name, op=op, **k: calls.append(name) or op(*a, **k)
            )
        first = receiver.prefill(prompts, payloads=payloads)
    fused = prefix == "soft" and kind == "linear" and bits != 16
    assert set(calls) == {"dequantize_project_calibrate" if fused else "project_calibrate"}
    assert ("dequantise" in phases) == (not fused)
    assert_plain(first, model, payloads, prompts)


class Halved(UniformQuantizer):
    """Sends half of the latent: its payloads do not hold the latent's own codes."""

    sends_codes = False

    def pack(self, latent_BMd: torch.Tensor, **options: Any) -> list[bytes]:
        return super().pack(latent_BMd / 2, **options)

    def unpack(self, payloads: Sequence[bytes], **options: Any) -> Any:
        halved_BMd, headers = super().unpack(payloads, **options)
        return halved_BMd * 2, headers


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize(("prefix", "kind"), [("soft", "mlp"), ("soft", "linear"), ("both", "mlp")])
def test_payloads_are_unpacked_as_their_bottleneck_does(
    reader: Reader, prefix: str, kind: str
) -> None:
    model = make_model(reader, prefix, kind=kind)
    plain = random_payloads(model)
    model.bottleneck = Halved(
        model.bottleneck_config,  # type: ignore[arg-type]
        latents=model.encoder_config.latents,
        d_z=model.encoder_config.d_z,
    )
    payloads = random_payloads(model)
    prompts, receiver = asking(reader, QUESTIONS), Receiver.of(model, reader)
    first = receiver.prefill(prompts, payloads=payloads)
    assert_plain(first, model, payloads, prompts)
    assert len(plain[0]) == len(payloads[0])
    with pytest.raises(PayloadError, match="CRC"):
        receiver.prefill(prompts, payloads=[payloads[0][:-1] + b"\0", *payloads[1:]])


class FirstOnly(SoftPrompt):
    """One soft token, whatever the number of latents."""

    positions = 1  # type: ignore[assignment]

    def forward(self, latent_BMd: Tensor, **options: Any) -> Tensor:
        return super().forward(latent_BMd, **options)[:, :1]


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("prefix", ["soft", "both"])
def test_an_attachment_says_how_many_positions_it_takes(reader: Reader, prefix: str) -> None:
    model = make_model(reader, prefix)
    soft = model.attachment(reader.name, "prefixes")
    assert soft is not None
    soft.__class__ = FirstOnly
    payloads, prompts = random_payloads(model), asking(reader, QUESTIONS)
    receiver = Receiver.of(model, reader)
    first = receiver.prefill(prompts, payloads=payloads)
    assert_plain(first, model, payloads, prompts)
    if receiver.engine == "eager":
        assert first.positions == max(len(prompt.ids) for prompt in prompts) + model.positions


@pytest.mark.usefixtures("engine")
def test_pure_mode_needs_no_question(reader: Reader) -> None:
    model = make_model(reader, mode="pure")
    receiver = Receiver.of(model, reader)
    payloads = model.encode_payloads(CONTEXTS, QUESTIONS)
    prompts = asking(reader, ["", "", ""], mode="pure")
    assert_plain(receiver.prefill(prompts, payloads=payloads), model, payloads, prompts)


def test_soft_tokens_equal_generate_of_transformers(reader: Reader) -> None:
    model = make_model(reader)
    receiver = Receiver.of(model, reader)
    payload, prompt = random_payloads(model, 1), asking(reader, [QUESTIONS[0]])[0]
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
    assert receiver.generate([prompt], payloads=payload, options=at_most(NEW)) == [expected]


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("trained", [True, False])
def test_text_is_read_by_the_same_engine(reader: Reader, trained: bool) -> None:
    """With a receiver of payloads, and with one that has nothing trained."""
    receiver = (
        Receiver.of(make_model(reader, "both"), reader) if trained else Receiver.for_text(reader)
    )
    turns = [Turn(question) for question in QUESTIONS]
    prompts = reader.prompts.build_many(turns, contexts=CONTEXTS)
    first = receiver.prefill(prompts)
    for row, prompt in enumerate(prompts):
        logits, ids = text_alone(reader, prompt, new_tokens=12)
        torch.testing.assert_close(first.logits_BV[row], logits, rtol=1e-5, atol=1e-4)
        assert first.generate()[row] == ids


@torch.no_grad()
def text_alone(reader: Reader, prompt: Prompt, *, new_tokens: int) -> tuple[Tensor, list[int]]:
    """First logits and greedy tokens of a text, by `generate` of transformers."""
    ids = torch.tensor([prompt.ids])
    logits = reader.model(input_ids=ids, use_cache=False).logits[0, -1]
    out = reader.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=reader.pad_id,
    )[0, len(prompt.ids) :].tolist()
    eos = reader.prompts.eos_id
    return logits, out[: out.index(eos)] if eos in out else out


def test_compiled_backbone(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced by dynamo, which makes no mask; what inductor makes of it is torch's business."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: compile_(*a, **k, backend="eager"))
    model = make_model(reader)
    receiver = Receiver.of(model, reader, options=ReceiverOptions(engine="compile"))
    payloads, prompts = random_payloads(model), asking(reader, QUESTIONS)
    first = receiver.prefill(prompts, payloads=payloads)
    eager = Receiver.of(model, reader, options=ReceiverOptions(engine="eager")).prefill(
        prompts, payloads=payloads
    )
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
    receiver = Receiver.of(make_model(reader), reader, options=ReceiverOptions(engine="compile"))
    texts = [
        reader.prompts.build([Turn("Where?")], context="He lives there. " * n) for n in (1, 4, 9, 2)
    ]
    for prompt in texts:
        receiver.prefill([prompt])
    assert len(graphs) == 1
    for rows in (2, 3, 4):
        receiver.prefill(texts[:rows])
    assert len(graphs) == 2
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=1):
        receiver.prefill(texts[:1])
        with pytest.raises(Exception, match="recompile_limit"):
            receiver.prefill(texts[:2])
    torch._dynamo.reset()


def test_padding_stays_within_a_table_of_positions(
    readers: dict[str, Reader], uncaptured: None
) -> None:
    """GPT-2 looks positions up in a table, and its layers have another name."""
    reader = gpt2_reader(readers["llama"], positions=46)
    model = make_model(reader, "both")
    receiver = Receiver.of(model, reader, options=ReceiverOptions(new_tokens=1))
    positions = 46 - LATENTS - 1
    short = asking(reader, ["Who?"])[0]
    prompt = Prompt([*short.ids, *short.ids[-1:] * (positions - LATENTS - len(short.ids))],
                    latent_at=short.latent_at)  # fmt: skip
    payloads = random_payloads(model, 1)
    first = receiver.prefill([prompt], payloads=payloads)
    assert first.positions == 46
    expected, ids = plain_path(model, reader, payloads[0], prompt, new_tokens=1)
    torch.testing.assert_close(first.logits_BV[0], expected, rtol=1e-5, atol=1e-5)
    assert first.generate(at_most(1)) == [ids]


# --- what a prefill leaves ------------------------------------------------------------------------


@pytest.mark.usefixtures("engine")
def test_decoding_twice_starts_from_the_prompt_both_times(reader: Reader) -> None:
    model = make_model(reader, "deep")
    receiver = Receiver.of(model, reader)
    first = receiver.prefill(asking(reader, QUESTIONS), payloads=random_payloads(model))
    once = first.generate(at_most(9))
    assert first.generate(at_most(9)) == once
    assert int(first.cache.get_seq_length()) == first.positions


@pytest.mark.usefixtures("uncaptured")
def test_a_graphs_cache_is_static_and_refused_once_overwritten(reader: Reader) -> None:
    model = make_model(reader)
    receiver = Receiver.of(model, reader)
    prompts = asking(reader, QUESTIONS)
    old = receiver.prefill(prompts, payloads=random_payloads(model))
    assert isinstance(old.cache, StaticCache)
    old_logits = old.logits_BV.clone()
    new = receiver.prefill(prompts, payloads=random_payloads(model))
    assert new.generate(at_most(4))
    with pytest.raises(ConfigError, match="overwritten"):
        old.generate(at_most(4))
    assert torch.equal(old.logits_BV, old_logits)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("prefix", PREFIXES)
def test_more_tokens_than_a_graph_has_room_for_are_decoded_too(reader: Reader, prefix: str) -> None:
    model = make_model(reader, prefix)
    receiver = Receiver.of(model, reader, options=ReceiverOptions(new_tokens=3))
    payloads, prompts = random_payloads(model), asking(reader, QUESTIONS)
    first = receiver.prefill(prompts, payloads=payloads)
    assert_plain(first, model, payloads, prompts)
    short = first.generate(at_most(3))
    assert short == [ids[:3] for ids in first.generate(at_most(NEW))]


@pytest.mark.usefixtures("engine")
def test_what_was_asked_for_counts_and_not_the_room_in_a_graph(
    readers: dict[str, Reader],
) -> None:
    """A table of 46 positions: a prompt that fits with 4 tokens more is answered with 4."""
    reader = gpt2_reader(readers["llama"], positions=46)
    prompt = Prompt([3] * 42)
    receiver = Receiver.for_text(reader)
    answer = receiver.generate([prompt], options=DecodeOptions(4, eos_ban_steps=4))
    assert [len(ids) for ids in answer] == [4]
    with pytest.raises(DataError, match="takes 47 positions, reader 'gpt2' knows 46"):
        receiver.generate([Prompt([3] * 47)])


@pytest.mark.usefixtures("engine")
def test_each_row_ends_where_the_table_of_positions_does(
    readers: dict[str, Reader], caplog: pytest.LogCaptureFixture
) -> None:
    reader = gpt2_reader(readers["llama"], positions=64)
    receiver = Receiver.for_text(reader)
    prompts = [Prompt([*range(3, 65)]), Prompt([*range(9, 29)])]
    options = DecodeOptions(10, eos_ban_steps=10)
    alone = [receiver.generate([prompt], options=options)[0] for prompt in prompts]
    assert [len(ids) for ids in alone] == [3, 10]
    assert receiver.generate(prompts, options=options) == alone
    warnings = [r.message for r in caplog.records if "an answer was cut" in r.message]
    assert len(warnings) == 1
    assert "reader 'gpt2' has a table of 64 positions" in warnings[0]


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
            receiver.prefill(
                asking(receiver.reader, QUESTIONS), payloads=[good[0], damage(good[1]), good[2]]
            )
        assert receiver.prefill(asking(receiver.reader, QUESTIONS), payloads=good).generate(
            at_most(2)
        )

    def test_payloads_of_another_shape_or_of_two_precisions(
        self, made: tuple[Receiver, Interlingua]
    ) -> None:
        receiver, model = made
        other = wire.pack(
            torch.randn(LATENTS + 1, D_Z), bits=6, group_size=16, fingerprint=model.fingerprint
        )
        prompts = asking(receiver.reader, QUESTIONS[:2])
        with pytest.raises(PayloadError, match=r"payload 1: it holds a latent \(5, 8\)"):
            receiver.prefill(prompts, payloads=[*random_payloads(model, 1), other])
        mixed = random_payloads(model, 1, 6) + random_payloads(model, 1, 8)
        with pytest.raises(PayloadError, match="payload 1: it has 8 bits"):
            receiver.prefill(prompts, payloads=mixed)
        with pytest.raises(PayloadError, match="no payloads"):
            receiver.prefill(prompts, payloads=[])

    def test_embeddings_that_do_not_fit(self, made: tuple[Receiver, Interlingua]) -> None:
        receiver, model = made
        prompts, width = asking(receiver.reader, QUESTIONS[:2]), receiver.reader.d_model
        fits = torch.zeros(2, width)
        with pytest.raises(ConfigError, match="1 embeddings for 2 prompts"):
            receiver.prefill(prompts, embeddings=[fits])
        with pytest.raises(ConfigError, match=rf"embedding 1 is \[2, 3\], .* takes \[M, {width}\]"):
            receiver.prefill(prompts, embeddings=[fits, torch.zeros(2, 3)])
        with pytest.raises(ConfigError, match="both payloads and embeddings"):
            receiver.prefill(prompts, payloads=random_payloads(model, 2), embeddings=[fits, fits])
        text_only = Receiver.for_text(receiver.reader)
        with pytest.raises(ConfigError, match="reads text only; make one with"):
            text_only.prefill(prompts, payloads=random_payloads(model, 2))

    def test_prompts_that_do_not_fit(self, made: tuple[Receiver, Interlingua]) -> None:
        receiver, model = made
        payloads, reader = random_payloads(model, 2), receiver.reader
        text = reader.prompts.build([Turn("Who?")], context="")
        (who,) = asking(reader, ["Who?"])
        with pytest.raises(ConfigError, match="2 payloads for 3 prompts"):
            receiver.prefill(asking(reader, QUESTIONS), payloads=payloads)
        with pytest.raises(ConfigError, match="prompt 1 was built as text"):
            receiver.prefill([who, text], payloads=payloads)
        with pytest.raises(ConfigError, match="prompt 0 was built with `latent=`"):
            receiver.prefill([who])
        with pytest.raises(ConfigError, match="no prompts"):
            receiver.prefill([])
        with pytest.raises(ConfigError, match="prompt 0 is empty"):
            receiver.prefill([Prompt()])
        with pytest.raises(ConfigError, match="1 numbers for 2 prompts"):
            receiver.generate([text, text], numbers=[0])
        for at in (-1, 3):
            with pytest.raises(ConfigError, match=f"prompt 0 has its latent at {at} of 2 tokens"):
                receiver.prefill([Prompt([1, 2], latent_at=at)], payloads=payloads[:1])
        vocabulary = receiver.reader.embedding.num_embeddings
        with pytest.raises(ConfigError, match=f"has token {vocabulary}, and reader"):
            receiver.prefill([Prompt([1]), Prompt([2, vocabulary])])


def test_a_reader_with_other_weights_is_refused(reader: Reader) -> None:
    model = make_model(reader)
    architecture = "llama" if reader.name == "llama" else "qwen2"
    weights = tiny_model(architecture, reader.tokenizer, seed=9)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="other weights"):
        Receiver.of(model, Reader(weights, reader.tokenizer, name=reader.name))


def test_parts_and_layers_in_the_wrong_place_are_refused(readers: dict[str, Reader]) -> None:
    reader = readers["llama"]
    adapter = make_model(reader).parts("llama")["soft"]
    kind = PayloadKind(LATENTS, D_Z, 0)
    with pytest.raises(ConfigError, match="needs an adapter, a deep prefix, or both"):
        Receiver(reader, None, payload_kind=kind)
    with pytest.raises(ConfigError, match="the adapter is on meta"):
        Receiver(reader, adapter.to("meta"), payload_kind=kind)
    lost = Reader(tiny_model("llama", reader.tokenizer), reader.tokenizer, name="llama")  # type: ignore[arg-type]
    lost.model.get_decoder().layers[1].to("meta")
    with pytest.raises(ConfigError, match="layer 1 is on 'meta'"):
        Receiver(lost, adapter, payload_kind=kind)


# --- graphs and their parts -----------------------------------------------------------------------


@pytest.mark.usefixtures("uncaptured")
def test_a_steady_stream_of_requests_captures_once_per_shape(reader: Reader) -> None:
    model = make_model(reader)
    receiver = Receiver.of(model, reader)
    batches = [asking(reader, QUESTIONS[:rows]) for rows in (1, 3)]
    for _ in range(3):
        for prompts in batches:
            payloads = random_payloads(model, len(prompts))
            assert_plain(receiver.prefill(prompts, payloads=payloads), model, payloads, prompts)
    assert receiver.passes.captures == 2
    receiver.passes._limit = receiver.passes.bytes
    receiver.prefill(batches[0], payloads=random_payloads(model, 1, bits=8))
    assert receiver.passes.captures == 3
    assert [shape.rows for shape in receiver.passes.shapes] == [3, 1]


@pytest.mark.usefixtures("uncaptured")
def test_batches_of_several_sizes_share_a_graph(reader: Reader) -> None:
    """Five prompts and six are read by one graph, whose cache has a row too many for the five."""
    model = make_model(reader, "both")
    receiver = Receiver.of(model, reader)
    for rows in (5, 6):
        prompts = asking(reader, [*QUESTIONS, "Who?", "Where?", "Who lives in Bakrim?"][:rows])
        payloads = random_payloads(model, rows)
        first = receiver.prefill(prompts, payloads=payloads)
        assert_plain(first, model, payloads, prompts, tokens=4)
        assert first.cache.layers[0].keys.shape[0] == rows  # type: ignore[union-attr]
        shared = receiver.prefill(prompts, payloads=payloads[:1])
        assert_plain(shared, model, payloads[:1] * rows, prompts, tokens=4)
        receiver.prefill(prompts, payloads=payloads[:1])
        with pytest.raises(ConfigError, match="overwritten"):
            shared.generate(at_most(2))
    assert receiver.passes.captures == 2
    assert {(shape.payloads, shape.rows) for shape in receiver.passes.shapes} == {(6, 6), (1, 6)}


@pytest.mark.usefixtures("uncaptured")
def test_graphs_are_captured_ahead(reader: Reader) -> None:
    model = make_model(reader)
    receiver, prompts = Receiver.of(model, reader), asking(reader, QUESTIONS)
    payloads = random_payloads(model)
    assert receiver.capture(prompts[:1], payloads=payloads[:1], rows=(1, 3, 5, 6)) == 3
    assert receiver.capture(prompts[:1], payloads=payloads[:1], rows=(3,), shared=True) == 1
    assert receiver.capture(prompts[:1], payloads=payloads[:1], rows=(2, 6)) == 1
    for rows in (1, 2, 3, 5):
        own = random_payloads(model, rows)
        assert_plain(
            receiver.prefill(prompts[:1] * rows, payloads=own),
            *(model, own, prompts[:1] * rows),
            tokens=2,
        )
    assert receiver.passes.captures == 5
    with pytest.raises(PayloadError):
        receiver.capture(prompts[:1], payloads=[payloads[0][:-1]])


def test_a_receiver_without_graphs_captures_none(reader: Reader) -> None:
    model = make_model(reader)
    prompts, payloads = asking(reader, QUESTIONS), random_payloads(model)
    assert Receiver.of(model, reader).capture(prompts, payloads=payloads, rows=(1, 4)) == 0


@pytest.mark.parametrize("rows", range(1, 65))
def test_a_third_of_the_rows_at_most_is_padding(rows: int) -> None:
    assert rows <= row_bucket(rows) <= max(rows * 1.5 - 0.5, rows)
    assert row_bucket(row_bucket(rows)) == row_bucket(rows)


def test_widths_come_in_few_sizes() -> None:
    widths = [width_bucket(width) for width in range(1, 4097)]
    assert all(1 <= width <= bucket for width, bucket in enumerate(widths, 1))
    assert all(bucket < width + max(8, width / 16) for width, bucket in enumerate(widths, 1))
    assert [width_bucket(width) for width in (1, 33, 256, 257, 1000)] == [8, 40, 256, 272, 1024]
    assert len(set(widths)) == 96


def test_without_memory_for_one_more_graph_the_others_go() -> None:
    passes: PassCache[Any] = PassCache(10)
    small: Any = SimpleNamespace(bytes=1)

    def capture() -> Any:
        if passes.shapes:
            raise torch.OutOfMemoryError
        return small

    shapes: list[Any] = ["a", "b"]
    for shape in shapes:
        assert passes.get(shape, capture) is small
        assert passes.shapes == [shape]

    def never() -> Any:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        passes.get(shapes[0], never)
    assert passes.captures == 2


def test_the_pass_cache_drops_what_was_not_used_for_longest() -> None:
    made: list[Any] = []

    def get(cache: PassCache[Any], shape: Any, size: int = 1) -> Any:
        return cache.get(shape, lambda: made.append(shape) or SimpleNamespace(bytes=size))

    cache: PassCache[Any] = PassCache(2)
    a = get(cache, "a")
    get(cache, "b")
    assert get(cache, "a") is a
    get(cache, "c")
    assert list(cache.shapes) == ["a", "c"]
    assert get(cache, "a") is a
    get(cache, "b")
    assert made == ["a", "b", "c", "b"]
    large = get(cache, "large", size=3)
    assert list(cache.shapes) == ["large"]
    assert get(cache, "large") is large


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
    prompts = asking(reader, QUESTIONS)
    soft = torch.randn(3, LATENTS, reader.d_model)
    batch = reader.collate(prompts, prefixes=soft)
    layout = lay_out(prompts, soft_tokens=LATENTS, pad_id=reader.pad_id)
    assert np.array_equal(layout.ids_BT, batch.ids_BT.numpy())
    assert np.array_equal(layout.lengths_B, batch.lengths_B.numpy())
    rows, columns = batch.places_P2.unbind(1)
    assert np.array_equal(np.argwhere(layout.slots_BT >= 0), batch.places_P2.numpy())
    assert layout.slots_BT[rows, columns].tolist() == [*range(LATENTS)] * 3
    wider = lay_out(prompts, soft_tokens=LATENTS, pad_id=reader.pad_id, width_of=lambda longest: 64)
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
    engines = [
        Receiver.of(model, reader, options=ReceiverOptions(engine=engine))
        for engine in ("eager", "graph")
    ]
    return model, engines[0], engines[1]


def assert_same(found: Prefilled, expected: Prefilled, tokens: int = NEW) -> None:
    largest = float(expected.logits_BV.abs().max())
    torch.testing.assert_close(
        found.logits_BV.float(), expected.logits_BV.float(), rtol=1e-5, atol=1e-5 * largest
    )
    assert found.generate(at_most(tokens)) == expected.generate(at_most(tokens))


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
    prompts = asking(reader, QUESTIONS)
    for _ in range(3):
        payloads = random_payloads(model)
        assert_same(
            graph.prefill(prompts, payloads=payloads), eager.prefill(prompts, payloads=payloads)
        )
    assert graph.passes.captures == 1
    for rows in (1, 2, 1, 3):
        payloads = random_payloads(model, rows)
        one, other = (r.prefill(prompts[:rows], payloads=payloads) for r in (graph, eager))
        assert_same(one, other, tokens=4)
    assert graph.passes.captures <= 3


@pytest.mark.gpu
@pytest.mark.parametrize("prefix", PREFIXES)
def test_captured_ahead_and_decoded_by_graphs(on_gpu: Callable[..., Reader], prefix: str) -> None:
    """Nothing is captured any more once requests come, for batches that fill no bucket either."""
    reader = on_gpu("llama")
    model, eager, graph = eager_and_graph(reader, prefix)
    prompts = asking(reader, [*QUESTIONS, *QUESTIONS])
    example = max(prompts, key=lambda prompt: len(prompt.ids))
    assert graph.capture([example], payloads=random_payloads(model, 1), rows=(1, 3, 5)) == 3
    assert graph._graphs is not None
    assert graph._graphs.no_step is None
    for rows in (5, 1, 3, 6, 5):
        asked, payloads = [*prompts[: rows - 1], example], random_payloads(model, rows)
        found, expected = (r.prefill(asked, payloads=payloads) for r in (graph, eager))
        assert_same(found, expected)
    assert graph.passes.captures == 3


@pytest.mark.gpu
@pytest.mark.skipif(find_spec("flash_attn") is None, reason="flash-attn is not installed")
@pytest.mark.parametrize("prefix", PREFIXES)
def test_graph_with_flash_attention_2(on_gpu: Callable[..., Reader], prefix: str) -> None:
    reader = on_gpu("llama", attn_implementation="flash_attention_2", dtype=torch.bfloat16)
    model, eager, graph = eager_and_graph(reader, prefix)
    payloads, prompts = random_payloads(model), asking(reader, QUESTIONS)
    found, expected = (r.prefill(prompts, payloads=payloads).logits_BV for r in (graph, eager))
    torch.testing.assert_close(found, expected, rtol=3e-2, atol=3e-2 * float(expected.abs().max()))


@pytest.mark.gpu
@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("prefix", PREFIXES)
def test_graph_with_a_4_bit_reader(on_gpu: Callable[..., Reader], prefix: str) -> None:
    reader = on_gpu("llama", device=None, load_in_4bit=True, dtype=torch.bfloat16)
    model, eager, graph = eager_and_graph(reader, prefix)
    payloads, prompts = random_payloads(model), asking(reader, QUESTIONS)
    found, expected = (r.prefill(prompts, payloads=payloads).logits_BV for r in (graph, eager))
    torch.testing.assert_close(found, expected, rtol=3e-2, atol=3e-2 * float(expected.abs().max()))


@pytest.mark.gpu
@pytest.mark.parametrize("prefix", PREFIXES)
def test_requests_that_overtake_the_gpu(on_gpu: Callable[..., Reader], prefix: str) -> None:
    """The GPU is busy while requests queue up, on two streams: no input may be overwritten before
    it was read, and no result before it was copied."""
    reader = on_gpu("llama")
    model, eager, graph = eager_and_graph(reader, prefix)
    prompts = asking(reader, QUESTIONS)
    batches = [random_payloads(model) for _ in range(4)]
    expected = [eager.prefill(prompts, payloads=payloads).logits_BV for payloads in batches]
    graph.prefill(prompts, payloads=batches[0])
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    found = []
    for number, payloads in enumerate(batches):
        with torch.cuda.stream(streams[number % 2]):
            torch.cuda._sleep(20_000_000)
            found.append(graph.prefill(prompts, payloads=payloads).logits_BV)
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
    prompts = asking(reader, QUESTIONS)
    batches = [random_payloads(model, rows) for rows in (3, 1) * 4]
    expected = [eager.prefill(prompts[: len(p)], payloads=p).logits_BV for p in batches]
    for payloads in batches[:2]:
        graph.prefill(prompts[: len(payloads)], payloads=payloads)
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    found = []
    for number, payloads in enumerate(batches):
        with torch.cuda.stream(streams[number % 2]):
            torch.cuda._sleep(20_000_000 if number % 2 == 0 else 1_000)
            found.append(graph.prefill(prompts[: len(payloads)], payloads=payloads).logits_BV)
    torch.cuda.synchronize()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


@pytest.mark.gpu
def test_a_capture_that_fails_costs_itself_alone(
    on_gpu: Callable[..., Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = on_gpu("llama")
    model, eager, graph = eager_and_graph(reader, "soft")
    payloads, prompts = random_payloads(model), asking(reader, QUESTIONS)
    stream = torch.cuda.current_stream()
    head, forward = reader.head, reader.head.forward

    def synchronising(hidden_BD: Tensor) -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            hidden_BD.sum().item()
        return forward(hidden_BD)

    with monkeypatch.context() as patch:
        patch.setattr(head, "forward", synchronising)
        with pytest.raises(RuntimeError):
            graph.prefill(prompts, payloads=payloads)
    assert torch.cuda.current_stream() == stream
    torch.randn(4, device="cuda:0").uniform_()
    assert_same(
        graph.prefill(prompts, payloads=payloads), eager.prefill(prompts, payloads=payloads)
    )


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
    payloads, prompts = random_payloads(model), asking(reader, QUESTIONS)
    first = receiver.prefill(prompts, payloads=payloads)
    expected = Receiver.of(model, whole).prefill(prompts, payloads=payloads)
    torch.testing.assert_close(first.logits_BV.cpu(), expected.logits_BV, rtol=1e-4, atol=1e-3)
    assert len(first.generate(at_most(4))) == 3
