"""vLLM answers payloads as transformers does. Needs vLLM: `make test-vllm` runs these.

Every reader here has heads of 32, the least that vLLM's CPU build computes: random ones of three
families, and `testbed:qwen` as it is shipped, which is served. Latents are random: answers mean
nothing, but each payload has another one.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast

from families import HALF_WINDOWED, Family
from latentwire_fast.errors import ConfigError
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.prompts.builder import Prompt, Turn
from latentwire_fast.readers.decoding import DecodeOptions
from latentwire_fast.readers.loading import resolve_source
from latentwire_fast.readers.reader import Reader
from latentwire_fast.serving import Receiver
from latentwire_fast.serving.vllm import VllmPrompts
from latentwire_fast.serving.vllm_server import VllmServer
from readers import tiny_interlingua

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM: make test-vllm")

PROMPTS, LATENTS, TOKENS = 20, 40, 8
BLOCK = 32  # positions of a block of the prefix cache: fewer than a prompt has
ENGINE = {
    "dtype": "float32",
    "enable_prompt_embeds": True,
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 8,
    "block_size": BLOCK,
}
FAMILIES = {
    "llama": Family("Llama", "llama", {"head_dim": 32}),
    "qwen2": Family("Qwen2", "qwen2", {"num_attention_heads": 2}),
    # Its head is its embeddings: wide ones would have it repeat the last token for ever.
    "gemma": Family(
        "Gemma 3", "gemma3_text", {"head_dim": 32, "initializer_range": 0.05, **HALF_WINDOWED}
    ),
}
SERVED = "testbed:qwen"
OPTIONS = DecodeOptions(max_new_tokens=TOKENS)
# A trained reader has nothing to say about random latents, and ends at once.
OF_SERVER = DecodeOptions(max_new_tokens=TOKENS, eos_ban_steps=4)
ENVIRONMENT = {
    **os.environ,
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}


@dataclass
class Asked:
    """A reader, payloads for it, and prompts about them.

    Attributes:
        pair: two messages whose first payloads are the same.
    """

    folder: str
    reader: Reader
    model: Interlingua
    prompts: list[Prompt]
    payloads: list[bytes]

    @property
    def vllm(self) -> VllmPrompts:
        return VllmPrompts(self.model, self.reader)

    @property
    def pair(self) -> list[list[bytes]]:
        first, second, third = self.payloads[:3]
        return [[first, second], [first, third]]

    @property
    def texts(self) -> list[Prompt]:
        turns = [Turn("Where does Nulnak live?"), Turn("Who?")]
        contexts = ["Nulnak has a dog. Nulnak lives in Tarbek.", "Kel is 7."]
        return self.reader.prompts.build_many(turns, contexts=contexts)

    def answers(
        self, prompts: list[Prompt], payloads: Any = None, options: DecodeOptions = OPTIONS
    ) -> list[list[int]]:
        """What transformers answers."""
        receiver = Receiver.of(self.model, self.reader)
        return receiver.generate(prompts, payloads=payloads, options=options)


@pytest.fixture(scope="module")
def asked(
    llama_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Asked]:
    made = {}
    for name in (*FAMILIES, SERVED):
        folder = resolve_source(SERVED)
        if name in FAMILIES:
            folder = str(tmp_path_factory.mktemp("served") / name)
            FAMILIES[name].model(llama_tokenizer).save_pretrained(folder)
            llama_tokenizer.save_pretrained(folder)
        reader = Reader.load(folder, name=name)
        model = tiny_interlingua({name: reader}, "context", latents=LATENTS)
        generator = torch.Generator().manual_seed(4)
        latent_BMd = torch.randn(PROMPTS, LATENTS, 8, generator=generator)
        turns = [Turn(f"Where do {number} and Nulnak live?") for number in range(PROMPTS)]
        prompts = reader.prompts.build_many(turns, latent="context")
        made[name] = Asked(folder, reader, model, prompts, model.payloads(latent_BMd))
    return made


def job(asked: Asked, folder: Path, *, caching: bool) -> dict[str, Any]:
    """What one engine is to do: each prompt alone, then eight at a time, then the pair and its
    first again, then text."""
    embeddings = asked.vllm.embeddings(asked.prompts, asked.payloads)
    pair = asked.vllm.embeddings(asked.prompts[:1] * 2, asked.pair)
    tensors = {f"{number}": rows_TD for number, rows_TD in enumerate([*embeddings, *pair])}
    save_file(tensors, folder / f"{asked.reader.name}.safetensors")
    names = [*tensors]
    every, both = names[:PROMPTS], names[PROMPTS:]
    return {
        "engine": {**ENGINE, "model": asked.folder, "enable_prefix_caching": caching},
        "sampling": asked.vllm.sampling(OPTIONS),
        "tensors": asked.reader.name,
        "rounds": [
            *([name] for name in every),
            *(every[start : start + 8] for start in range(0, PROMPTS, 8)),
            *([name] for name in [*both, both[0]]),
            [prompt["prompt_token_ids"] for prompt in asked.vllm.tokens(asked.texts)],
        ],
    }


@pytest.fixture(scope="module")
def found(
    asked: dict[str, Asked], tmp_path_factory: pytest.TempPathFactory, repository: Path
) -> dict[str, list[dict[str, Any]]]:
    """The answers of each engine, in one list."""
    folder = tmp_path_factory.mktemp("engines")
    jobs = {
        f"{name} {caching}": job(asked[name], folder, caching=caching)
        for name in FAMILIES
        for caching in (True, False)
    }
    (folder / "jobs.json").write_text(json.dumps(jobs))
    script = repository / "tests" / "serving" / "vllm_engines.py"
    done = subprocess.run(
        [sys.executable, str(script), str(folder)],
        env={**ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    rounds = json.loads((folder / "found.json").read_text())
    return {name: [answer for part in parts for answer in part] for name, parts in rounds.items()}


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_tokens_as_transformers(
    asked: dict[str, Asked], found: dict[str, Any], name: str, caching: bool
) -> None:
    own, answers = asked[name], found[f"{name} {caching}"]
    expected = own.answers(own.prompts, own.payloads)
    assert len({tuple(ids) for ids in expected}) > PROMPTS // 2  # payloads have a say
    ids = [own.vllm.answer_ids(answer["ids"]) for answer in answers]
    assert ids[:PROMPTS] == expected  # one by one
    assert ids[PROMPTS : 2 * PROMPTS] == expected  # eight at a time
    assert ids[-len(own.texts) :] == own.answers(own.texts)
    cached = [answer["cached"] for answer in answers[PROMPTS : 2 * PROMPTS]]
    assert all(count >= BLOCK if caching else not count for count in cached)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_prefix_cache_knows_two_payloads_apart(
    asked: dict[str, Asked], found: dict[str, Any], name: str
) -> None:
    """One question about two messages that begin with the same payload: a block is taken from the
    cache, and the answers are two."""
    own, answers = asked[name], found[f"{name} True"]
    one, other = own.answers(own.prompts[:1] * 2, own.pair)
    assert one != other
    pair = answers[2 * PROMPTS : 2 * PROMPTS + 3]
    assert [own.vllm.answer_ids(answer["ids"]) for answer in pair] == [one, other, one]
    first, second, again = (answer["cached"] for answer in pair)
    assert BLOCK <= first < again
    assert BLOCK <= second < again


# --- the server -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(asked: dict[str, Asked], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # `vllm serve` asks for the version of a package `vllm`, and the CPU build is `vllm-cpu`.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", asked[SERVED].folder]
    command += ["--host", "127.0.0.1", "--port", f"{port}", "--served-model-name", "qwen"]
    for option, value in ENGINE.items():
        name = f"--{option.replace('_', '-')}"
        command += [name] if value is True else [name, f"{value}"]
    url, log = f"http://127.0.0.1:{port}", tmp_path_factory.mktemp("server") / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=ENVIRONMENT, stdout=output, stderr=output, start_new_session=True
        )
    try:
        until = time.monotonic() + 600
        while not is_ready(url):
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < until, log.read_text()[-4000:]
            time.sleep(1)
        yield url
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=10) as response:
            return response.status == 200
    except OSError:
        return False


def test_the_server_answers_the_same(asked: dict[str, Asked], server: str) -> None:
    own = asked[SERVED]
    client = VllmServer(server, model="qwen")
    expected = own.answers(own.prompts, own.payloads, OF_SERVER)
    assert len({tuple(ids) for ids in expected}) > 1
    for _ in range(2):  # the second time from its prefix cache
        assert client.generate(own.vllm, own.prompts, own.payloads, options=OF_SERVER) == expected
    alone = client.generate(own.vllm, own.prompts[:1], own.payloads[:1], options=OF_SERVER)
    assert alone == expected[:1]


def test_the_server_says_what_it_refuses(asked: dict[str, Asked], server: str) -> None:
    qwen, llama = asked[SERVED], asked["llama"]
    with pytest.raises(ConfigError, match=r"refused.*\(404\).*'other'"):
        VllmServer(server, model="other").generate(
            qwen.vllm, qwen.prompts[:1], qwen.payloads[:1], options=OPTIONS
        )
    with pytest.raises(ConfigError, match=r"refused.*\(400\).*hidden_size 64"):
        VllmServer(server, model="qwen").generate(
            llama.vllm, llama.prompts[:1], llama.payloads[:1], options=OPTIONS
        )
