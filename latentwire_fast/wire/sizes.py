"""Sizes of payloads, and of the text that they replace."""

from __future__ import annotations

from collections.abc import Sequence


def payload_bytes(payload: bytes | Sequence[bytes]) -> int:
    """Bytes of a payload, or of all those that stand for one text."""
    return len(payload) if isinstance(payload, bytes) else sum(map(len, payload))


def utf8_bytes(text: str) -> int:
    """Bytes of the text as UTF-8."""
    return len(text.encode())


def brotli_bytes(text: str) -> int:
    """Bytes of the text compressed by itself: UTF-8 through Brotli at its best quality, 11."""
    import brotli  # here, because who only reads payloads can do without it

    return len(brotli.compress(text.encode(), quality=11))
