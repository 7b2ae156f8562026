"""Sizes of texts under general compressors, each text by itself: what a payload is held against.

zstd needs the package `zstandard` (an extra); without it there is a reason in the place of sizes.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from latentwire_fast import wire

ZSTD_LEVEL = 22
MAGIC_BYTES = 4  # at the start of every zstd frame; who expects one can do without them
DICTIONARY_BYTES = 112_640  # at most; zstd's own default
DICTIONARY_TEXTS = 2000  # training texts that a dictionary is made of, at most


def zlib_bytes(text: str) -> int:
    """Bytes of the text as UTF-8 through zlib at its best level, 9."""
    return len(zlib.compress(text.encode(), 9))


def why_no_zstd() -> str | None:
    """Why zstd cannot be measured; None where it can."""
    if find_spec("zstandard") is not None:
        return None
    return 'zstandard is not installed (pip install "latentwire-fast[zstd]")'


class Zstd:
    """zstd at its strongest level, alone or with a dictionary that both sides have.

    Args:
        texts: what the dictionary is made of; none: no dictionary.

    Attributes:
        dictionary_bytes: its size; 0 without one. It is not part of any text's size.

    Raises:
        ValueError: too few texts for a dictionary.
    """

    def __init__(self, texts: Sequence[str] = ()) -> None:
        import zstandard  # here: it may not be installed

        options: dict[str, Any] = {}
        self.dictionary_bytes = 0
        if texts:
            try:
                trained = zstandard.train_dictionary(DICTIONARY_BYTES, [t.encode() for t in texts])
            except zstandard.ZstdError as error:
                raise ValueError(
                    f"{len(texts)} training texts make no dictionary: {error}"
                ) from None
            options = {"dict_data": trained, "write_dict_id": False}
            self.dictionary_bytes = len(trained)
        self._compressor = zstandard.ZstdCompressor(
            level=ZSTD_LEVEL, write_checksum=False, write_content_size=False, **options
        )

    def size(self, text: str) -> int:
        """Bytes of the text as UTF-8, without the frame's magic number."""
        return len(self._compressor.compress(text.encode())) - MAGIC_BYTES


@dataclass(frozen=True)
class TextSizes:
    """Bytes of each text of an evaluation by each compressor.

    Attributes:
        zstd, zstd_dictionary: empty where they were not measured.
        not_measured: why not, by name.
        dictionary: of zstd: its bytes and how many texts it was made of.
    """

    utf8: list[int]
    zlib: list[int]
    brotli: list[int]
    zstd: list[int] = field(default_factory=list)
    zstd_dictionary: list[int] = field(default_factory=list)
    not_measured: dict[str, str] = field(default_factory=dict)
    dictionary: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, texts: Sequence[str], *, training_texts: Sequence[str] | str = ()) -> TextSizes:
        """Measure.

        Args:
            training_texts: what the dictionary of zstd is made of, or why there are none.
        """
        sizes = cls(
            [*map(wire.utf8_bytes, texts)],
            [*map(zlib_bytes, texts)],
            [*map(wire.brotli_bytes, texts)],
        )
        if reason := why_no_zstd():
            sizes.not_measured.update(dict.fromkeys(("zstd", "zstd_dictionary"), reason))
            return sizes
        sizes.zstd.extend(map(Zstd().size, texts))
        if isinstance(training_texts, str) or not training_texts:
            sizes.not_measured["zstd_dictionary"] = str(training_texts or "no training texts")
            return sizes
        try:
            fitted = Zstd(training_texts)
        except ValueError as error:
            sizes.not_measured["zstd_dictionary"] = str(error)
            return sizes
        sizes.zstd_dictionary.extend(map(fitted.size, texts))
        sizes.dictionary.update(bytes=fitted.dictionary_bytes, texts=len(training_texts))
        return sizes
