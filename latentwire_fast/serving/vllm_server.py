"""Payloads and questions to vLLM's OpenAI-compatible server (`vllm serve --enable-prompt-embeds`).

    asking = VllmPrompts(model, reader)
    server = VllmServer("http://localhost:8000", model=FOLDER)
    ids = server.generate(asking, prompts, [payload])[0]
    asking.answer(ids)

The server takes embeddings in `/v1/completions` as what `torch.save` writes, in base64: a pickle
that it reads with `weights_only=True`. Its interface has no other format. Nothing here reads one.
"""

from __future__ import annotations

import base64
import io
import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from latentwire_fast.errors import ConfigError, DataError
from latentwire_fast.prompts.builder import Prompt
from latentwire_fast.readers.decoding import DecodeOptions
from latentwire_fast.serving.payload_batch import Message
from latentwire_fast.serving.vllm import VllmPrompts, check_embeddings

PATH = "/v1/completions"
MOST_BYTES = 64 << 20  # of a request: 8 prompts of 768 positions of a Llama-3.1-8B in bfloat16
LONGEST_REASON = 300  # characters of what a server says


class VllmServer:
    """Sends requests to one server.

    Args:
        url: where it listens, without a path: `http://HOST:PORT`.
        model: the name that it serves the reader by; the folder or hub id that it was started with,
            unless it was given another.
        api_key: that it asks for, if it does.
        timeout: seconds that an answer may take.
        most_bytes: of a request.

    Raises:
        ConfigError: a URL of another kind.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str,
        api_key: str | None = None,
        timeout: float = 600.0,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"vLLM server {url!r}: expected http://HOST:PORT or https://...")
        self.url, self.model = url.rstrip("/"), model
        self._api_key, self._timeout, self._most_bytes = api_key, timeout, most_bytes

    def generate(
        self,
        asking: VllmPrompts,
        prompts: Sequence[Prompt],
        payloads: Sequence[Message],
        *,
        options: DecodeOptions | None = None,
    ) -> list[list[int]]:
        """Token ids of each answer, up to what ends it and without that.

        Args:
            asking: of the reader that is served.
            prompts, payloads: as of `Receiver.generate`.
            options: greedy with their defaults.

        Raises:
            ConfigError: as of `VllmPrompts.embeddings` and `sampling`; no server there, or one that
                refuses the request or answers something else.
            PayloadError, DataError: as of `VllmPrompts.embeddings`; a request that is too large.
        """
        body = completion_body(
            asking.embeddings(prompts, payloads),
            width=asking.width,
            model=self.model,
            sampling=asking.sampling(options),
            most_bytes=self._most_bytes,
        )
        return [asking.answer_ids(ids) for ids in self._token_ids(self._post(body), len(prompts))]

    def _token_ids(self, answer: Any, prompts: int) -> list[list[int]]:
        try:
            found = {choice["index"]: choice["token_ids"] for choice in answer["choices"]}
            ids = [[int(token) for token in found[number]] for number in range(prompts)]
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{self.url}{PATH} answered without the token ids that were asked for "
                "(return_token_ids); is it vLLM 0.32 or later?"
            ) from error
        return ids

    def _post(self, body: Mapping[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if self._api_key is not None:
            headers["Authorization"] = f"Bearer {self._api_key}"
        request = urllib.request.Request(
            self.url + PATH, data=json.dumps(body).encode(), headers=headers, method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                reason = _reason(error.read())
            raise ConfigError(
                f"{self.url} refused the request ({error.code}): {reason}; it has to serve the "
                f"reader as {self.model!r}, with --enable-prompt-embeds"
            ) from error
        except (OSError, ValueError) as error:  # no connection, no time left, no JSON
            raise ConfigError(
                f"no answer from a vLLM server at {self.url}: {error}; start one with "
                "`vllm serve READER --enable-prompt-embeds`"
            ) from error


def completion_body(
    embeddings: Sequence[Tensor],
    *,
    width: int,
    model: str,
    sampling: Mapping[str, Any],
    most_bytes: int = MOST_BYTES,
) -> dict[str, Any]:
    """The JSON body of a request to `/v1/completions`, for a client of your own.

    Args:
        embeddings: of `VllmPrompts.embeddings`; checked again, whoever made them.
        width: of the reader that is served.
        model: as of `VllmServer`.
        sampling: of `VllmPrompts.sampling`.
        most_bytes: of the tensors in base64.

    Raises:
        ConfigError: as of `check_embeddings`.
        DataError: they have more bytes.
    """
    check_embeddings(embeddings, width=width)
    size = sum(_length_in_base64(rows_TD) for rows_TD in embeddings)
    if size > most_bytes:
        raise DataError(
            f"{len(embeddings)} prompts have {size:,} bytes of embeddings in base64, and a request "
            f"takes {most_bytes:,}; send fewer at a time, or raise `most_bytes`"
        )
    return {
        "model": model,
        "prompt_embeds": [_in_base64(rows_TD) for rows_TD in embeddings],
        "return_token_ids": True,
        **sampling,
    }


def _length_in_base64(rows_TD: Tensor) -> int:
    """About: the file's own bytes, under 2 KB, are not counted."""
    return -(-rows_TD.nbytes // 3) * 4


def _in_base64(rows_TD: Tensor) -> str:
    # A copy: `torch.save` writes all of a view's memory, which may hold what others asked.
    alone_TD = rows_TD.detach().cpu().clone(memory_format=torch.contiguous_format)
    file = io.BytesIO()
    torch.save(alone_TD, file)
    return base64.b64encode(file.getvalue()).decode("ascii")


def _reason(body: bytes) -> str:
    """What a server's refusal says."""
    try:
        words = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        words = body.decode(errors="replace")
    return " ".join(str(words).split())[:LONGEST_REASON] or "no reason given"
