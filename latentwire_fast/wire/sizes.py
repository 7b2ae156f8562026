"""Sizes of the text that a payload replaces."""

from __future__ import annotations

import brotli


def utf8_bytes(text: str) -> int:
    """Bytes of the text as UTF-8."""
    return len(text.encode())


def brotli_bytes(text: str) -> int:
    """Bytes of the text compressed by itself: UTF-8 through Brotli at its best quality, 11."""
    return len(brotli.compress(text.encode(), quality=11))
