"""Prompts for vLLM, without vLLM: what is sent is what the reader reads here, or it is refused."""

from __future__ import annotations

import base64
import gc
import io
import json
import threading
import weakref
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from families import Family
from latentwire_fast.errors import ConfigError, DataError, PayloadError
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.prompts.builder import Turn
from latentwire_fast.readers.card import ReaderCard
from latentwire_fast.readers.decoding import DecodeOptions
from latentwire_fast.readers.reader import Reader
from latentwire_fast.registry import BOTTLENECKS
from latentwire_fast.serving import Receiver
from latentwire_fast.serving.vllm import VllmPrompts, check_embeddings
from latentwire_fast.serving.vllm_server import VllmServer, completion_body
from receiving import asking, at_most, make_model, random_payloads
from runs import soft
from varying import TEXTS, encoder_of

QUESTIONS = ["Where does Nulnak live?", "Who?", "How old is Kel now?"]


@pytest.fixture
def model(reader: Reader) -> Interlingua:
    return make_model(reader)


# --- what is sent ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["context", "pure"])
def test_embeddings_are_those_of_training(reader: Reader, mode: Any) -> None:
    """Bit for bit what the reader is given in training: template, label, latent, question."""
    model = make_model(reader, mode=mode)
    prompts, payloads = asking(reader, QUESTIONS, mode), random_payloads(model)
    made = VllmPrompts(model, reader).embeddings(prompts, payloads)
    soft = model.prefix(reader.name, model.decode_payloads(payloads))
    batch = reader.collate(prompts, prefixes=soft)
    assert batch.embeds_BTD is not None
    for rows_TD, expected_TD, mask_T in zip(made, batch.embeds_BTD, batch.mask_BT, strict=True):
        torch.testing.assert_close(rows_TD, expected_TD[mask_T], rtol=0, atol=0)


def test_transformers_answers_them_as_the_receiver_answers_payloads(
    reader: Reader, model: Interlingua
) -> None:
    prompts, payloads = asking(reader, QUESTIONS), random_payloads(model)
    expected = Receiver.of(model, reader).generate(prompts, payloads=payloads, options=at_most(8))
    vllm_prompts = VllmPrompts(model, reader)
    for rows_TD, ids in zip(vllm_prompts.embeddings(prompts, payloads), expected, strict=True):
        found = reader.model.generate(
            inputs_embeds=rows_TD[None],
            attention_mask=torch.ones(1, len(rows_TD)),
            eos_token_id=reader.stop_ids,
            max_new_tokens=8,
            do_sample=False,
        )
        assert vllm_prompts.answer_ids(found[0].tolist()) == ids
        assert vllm_prompts.answer(found[0].tolist()) == reader.decode(ids)


def test_one_payload_for_all_and_several_for_one(reader: Reader, model: Interlingua) -> None:
    vllm_prompts, prompts = VllmPrompts(model, reader), asking(reader, QUESTIONS)
    first, second, _ = random_payloads(model)
    shared = vllm_prompts.embeddings(prompts, [first])
    for rows_TD, same_TD in zip(shared, vllm_prompts.embeddings(prompts, [first] * 3), strict=True):
        torch.testing.assert_close(rows_TD, same_TD, rtol=0, atol=0)
    (joined_TD,) = vllm_prompts.embeddings(prompts[:1], [[first, second]])
    (alone_TD,) = vllm_prompts.embeddings(prompts[:1], [second])
    behind = prompts[0].latent_at + 4  # M latents of the first
    torch.testing.assert_close(joined_TD[behind:], alone_TD[behind - 4 :], rtol=0, atol=0)


def test_payloads_of_several_lengths(readers: dict[str, Reader]) -> None:
    reader = readers["llama"]
    model = Interlingua(
        encoder_of(reader),
        {reader.name: ReaderCard.of(reader)},
        bottleneck=BOTTLENECKS.config("uniform", bits=6, group_size=16),
        attachments=[soft("film")],
        mode="context",
    )
    payloads, prompts = model.encode_payloads(TEXTS), asking(reader, QUESTIONS)
    vllm_prompts = VllmPrompts(model, reader)
    together = vllm_prompts.embeddings(prompts, payloads)
    assert len({model.latents_of(payload) for payload in payloads}) > 1
    for prompt, payload, rows_TD in zip(prompts, payloads, together, strict=True):
        assert len(rows_TD) == len(prompt.ids) + model.latents_of(payload)
        (alone_TD,) = vllm_prompts.embeddings([prompt], [payload])
        torch.testing.assert_close(rows_TD, alone_TD)


def test_gemma_gets_its_embeddings_scaled(llama_tokenizer: Any) -> None:
    """vLLM multiplies what it looks up itself, not what it is given; so does transformers."""
    gemma = Family("Gemma 3", "gemma3_text", {"head_dim": 16}).model(llama_tokenizer)
    reader = Reader(gemma, llama_tokenizer, name="gemma")
    (prompt,) = asking(reader, ["Who?"])
    model = make_model(reader)
    (rows_TD,) = VllmPrompts(model, reader).embeddings([prompt], random_payloads(model, rows=1))
    last_D = gemma.get_input_embeddings().weight[prompt.ids[-1]]
    torch.testing.assert_close(rows_TD[-1], last_D * gemma.config.hidden_size**0.5)


def test_only_the_embeddings_of_a_reader_are_kept(llama_folder: Path) -> None:
    reader = Reader.load(llama_folder, name="llama")
    model = make_model(reader)
    vllm_prompts = VllmPrompts(model, reader)
    layer = weakref.ref(reader.model.model.layers[0])
    prompts = vllm_prompts.prompts.build_many([Turn("Who?")], latent=model.mode)
    del reader
    gc.collect()
    assert layer() is None
    assert vllm_prompts.embeds(prompts, random_payloads(model, rows=1))


def test_text_is_sent_as_tokens(reader: Reader) -> None:
    prompt = reader.prompts.build([Turn("Who?")], context="Kel is 7.")
    assert VllmPrompts.tokens([prompt]) == [{"prompt_token_ids": prompt.ids}]
    with pytest.raises(ConfigError, match="room for a latent"):
        VllmPrompts.tokens(asking(reader, ["Who?"]))


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["deep", "both"])
def test_deep_prefixes_are_refused(reader: Reader, prefix: str) -> None:
    with pytest.raises(ConfigError, match=r"deep prefix .* cannot fill its KV cache.*'soft'"):
        VllmPrompts(make_model(reader, prefix), reader)


def test_lora_is_refused_until_it_is_merged(
    reader: Reader, model: Interlingua, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "lora_of", lambda name: SimpleNamespace(merged=False))
    with pytest.raises(ConfigError, match=r"LoRA.*save_pretrained"):
        VllmPrompts(model, reader)
    monkeypatch.setattr(model, "lora_of", lambda name: SimpleNamespace(merged=True))
    VllmPrompts(model, reader)


def test_prompts_and_payloads_have_to_match(reader: Reader, model: Interlingua) -> None:
    vllm_prompts, prompts = VllmPrompts(model, reader), asking(reader, QUESTIONS)
    payloads = random_payloads(model)
    with pytest.raises(ConfigError, match="2 payloads for 3 prompts"):
        vllm_prompts.embeddings(prompts, payloads[:2])
    with pytest.raises(ConfigError, match="latent"):
        vllm_prompts.embeddings([reader.prompts.build([Turn("Who?")], context="")], payloads[:1])
    with pytest.raises(PayloadError, match="payload 0"):
        vllm_prompts.embeddings(prompts[:1], [payloads[0][:-1]])
    prompts[0].ids[0] = 10**6
    with pytest.raises(ConfigError, match="token 1000000"):
        vllm_prompts.embeddings(prompts, payloads)
    with pytest.raises(DataError, match="positions"):
        vllm_prompts.embeddings(asking(reader, ["Who is it? " * 200]), payloads[:1])


@pytest.mark.parametrize(
    ("embeddings", "reason"),
    [
        ([], "no embeddings"),
        ([[[0.0]]], "list, expected a dense tensor"),
        ([torch.zeros(2, 4).to_sparse()], "sparse_coo"),
        ([torch.zeros(4)], r"\[4\], expected \[positions, 4\]"),
        ([torch.zeros(2, 5)], r"\[2, 5\], expected"),
        ([torch.zeros(0, 4)], r"\[0, 4\], expected"),
        ([torch.zeros(2, 4), torch.zeros(1, 2, 4)], "prompt 1"),
        ([torch.zeros(2, 4, dtype=torch.int8)], "int8, expected one of float32, float16"),
        ([torch.zeros(2, 4).double()], "float64"),
        ([torch.full((2, 4), torch.inf)], "finite"),
        ([torch.full((2, 4), torch.nan)], "finite"),
        ([torch.zeros(9, 4)], "9 positions, and the reader knows 8"),
    ],
)
def test_tensors_are_checked(embeddings: Any, reason: str) -> None:
    with pytest.raises((ConfigError, DataError), match=reason):
        check_embeddings(embeddings, width=4, max_positions=8)


def test_sampling_says_what_vllm_takes_from_elsewhere(reader: Reader, model: Interlingua) -> None:
    vllm_prompts = VllmPrompts(model, reader)
    assert vllm_prompts.sampling(DecodeOptions(max_new_tokens=3, eos_ban_steps=5)) == {
        "temperature": 0.0,
        "repetition_penalty": 1.0,
        "max_tokens": 3,
        "min_tokens": 3,
        "stop_token_ids": reader.stop_ids,
    }
    with pytest.raises(ConfigError, match="samples all"):
        vllm_prompts.sampling(DecodeOptions(first_token_temperature=0.5))


# --- the server -----------------------------------------------------------------------------------


def loaded(text: str) -> Tensor:
    """As the server does it."""
    return torch.load(io.BytesIO(base64.b64decode(text)), weights_only=True)


def test_a_body_holds_the_tensors_and_nothing_else() -> None:
    many_TD = torch.randn(1000, 4)
    body = completion_body([many_TD[3:5]], width=4, model="m", sampling={"max_tokens": 2})
    (text,) = body.pop("prompt_embeds")
    torch.testing.assert_close(loaded(text), many_TD[3:5], rtol=0, atol=0)
    assert len(text) < 4000  # not the 16,000 bytes of the others
    assert body == {"model": "m", "return_token_ids": True, "max_tokens": 2}


def test_a_body_has_a_limit() -> None:
    rows = [torch.zeros(2, 4)] * 3
    with pytest.raises(DataError, match=r"3 prompts have 132 bytes.*send fewer at a time"):
        completion_body(rows, width=4, model="m", sampling={}, most_bytes=100)
    with pytest.raises(ConfigError, match=r"expected \[positions, 5\]"):
        completion_body(rows, width=5, model="m", sampling={})


class FakeServer(HTTPServer):
    """Answers like vLLM: with the number of each prompt's positions."""

    answer: Any = None
    status = 200

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: FakeServer  # type: ignore[assignment]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = self.server.answer
        if answer is None:
            sizes = [len(loaded(text)) for text in body["prompt_embeds"]]
            choices = [{"index": i, "token_ids": [size]} for i, size in enumerate(sizes)]
            answer = {"choices": choices[::-1], "key": self.headers["Authorization"], **body}
        self.server.seen = self.path, self.headers["Authorization"]  # type: ignore[attr-defined]
        self.send_response(self.server.status)
        self.end_headers()
        self.wfile.write(answer if isinstance(answer, bytes) else json.dumps(answer).encode())

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.fixture
def fake_server() -> Iterator[FakeServer]:
    with FakeServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_server_is_asked(reader: Reader, model: Interlingua, fake_server: FakeServer) -> None:
    server = VllmServer(f"{fake_server.url}/", model="m", api_key="secret", timeout=20)
    prompts, payloads = asking(reader, QUESTIONS), random_payloads(model)
    vllm_prompts = VllmPrompts(model, reader)
    assert server.generate(vllm_prompts, prompts, payloads) == [
        [len(rows_TD)] for rows_TD in vllm_prompts.embeddings(prompts, payloads)
    ]
    assert fake_server.seen == ("/v1/completions", "Bearer secret")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("status", "answer", "reason"),
    [
        (400, {"error": {"message": "You must set `--enable"}}, r"\(400\): You must set `--enable"),
        (500, b"", "no reason given"),
        (200, {"choices": []}, "without the token ids"),
        (200, b"<html>", "no answer from a vLLM server"),
    ],
)
def test_a_server_that_refuses(
    reader: Reader,
    model: Interlingua,
    fake_server: FakeServer,
    status: int,
    answer: Any,
    reason: str,
) -> None:
    fake_server.status, fake_server.answer = status, answer
    prompts, payloads = asking(reader, ["Who?"]), random_payloads(model, rows=1)
    with pytest.raises(ConfigError, match=reason):
        VllmServer(fake_server.url, model="m", timeout=20).generate(
            VllmPrompts(model, reader), prompts, payloads
        )


def test_no_server(reader: Reader, model: Interlingua) -> None:
    with pytest.raises(ConfigError, match="expected http://HOST:PORT"):
        VllmServer("file:///etc/passwd", model="m")
    server = VllmServer("http://127.0.0.1:9", model="m", timeout=20)
    with pytest.raises(ConfigError, match="no answer from a vLLM server"):
        server.generate(
            VllmPrompts(model, reader), asking(reader, ["Who?"]), random_payloads(model, rows=1)
        )
