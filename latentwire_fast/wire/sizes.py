"""Sizes of the text that a payload replaces."""

from __future__ import annotations


def utf8_bytes(text: str) -> int:
    """Bytes of the text as UTF-8."""
    return len(text.encode())


def brotli_bytes(text: str) -> int:
    """Bytes of the text compressed by itself: UTF-8 through Brotli at its best quality, 11."""
    import brotli  # here, because who only reads payloads can do without it

    return len(brotli.compress(text.encode(), quality=11))
