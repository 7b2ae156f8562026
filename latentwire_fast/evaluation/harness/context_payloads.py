"""The payloads of the contexts that the harness asks about: each context is encoded once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from latentwire_fast import wire
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.prompts.builder import replaced_text

Key = tuple[str, str | None]  # a context, and in pure mode its question
Message = tuple[bytes, ...]  # the payloads that stand for one context


class ContextPayloads:
    """Encodes contexts, keeps their payloads and counts their bytes.

    Args:
        model: writes the payloads.
        bits: per value; the model's own number if None.
        chunk_length: cut longer contexts into chunks of at most so many of the encoder's tokens,
            each with a payload of its own; None refuses what is longer than the encoder reads.
        batch_size: contexts that are encoded together.
    """

    def __init__(
        self,
        model: Interlingua,
        *,
        bits: int | None = None,
        chunk_length: int | None = None,
        batch_size: int = 1,
    ) -> None:
        self.model = model
        self.bits = bits
        self.chunk_length = chunk_length
        self.batch_size = batch_size
        self._messages: dict[Key, Message] = {}

    def of(self, keys: Sequence[Key]) -> list[Message]:
        """The payloads of each context.

        Raises:
            ConfigError: a width that the model cannot send.
            DataError: a context is longer than the encoder reads.
        """
        new = [key for key in dict.fromkeys(keys) if key not in self._messages]
        for start in range(0, len(new), self.batch_size):
            some = new[start : start + self.batch_size]
            self._messages.update(zip(some, self._encode(some), strict=True))
        return [self._messages[key] for key in keys]

    def _encode(self, keys: Sequence[Key]) -> list[Message]:
        contexts = [context for context, _ in keys]
        pure = self.model.mode == "pure"
        questions = [question or "" for _, question in keys] if pure else None
        if self.chunk_length is None:
            payloads = self.model.encode_payloads(contexts, questions, bits=self.bits)
            return [(payload,) for payload in payloads]
        return self.model.encode_chunks(
            contexts, questions, length=self.chunk_length, bits=self.bits
        )

    def summary(self) -> dict[str, Any]:
        """How many contexts there were, and the bytes of their payloads beside those of their
        texts (UTF-8, without and with brotli), on average."""
        count = len(self._messages)
        if not count:
            return {"contexts": 0}
        mode = self.model.mode
        texts = [replaced_text(c, q or "", mode=mode) for c, q in self._messages]
        return {
            "contexts": count,
            "payload_bytes_mean": sum(map(wire.payload_bytes, self._messages.values())) / count,
            "text_utf8_bytes_mean": sum(map(wire.utf8_bytes, texts)) / count,
            "text_brotli_bytes_mean": sum(map(wire.brotli_bytes, texts)) / count,
        }
