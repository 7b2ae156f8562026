"""The sentences that match the question best, to as many bytes as the payload."""

from __future__ import annotations

from dataclasses import dataclass

from latentwire_fast.evaluation.methods.base import ByBits, MethodConfig
from latentwire_fast.evaluation.methods.bm25_sentences import BM25Sentences


class BM25SentencesBytes(BM25Sentences):
    """`BM25Sentences` with the budget in bytes."""

    @dataclass(frozen=True)
    class Config(MethodConfig):
        """No settings."""

    label = "Retrieved sentences, bytes"
    note = "those that match the question best, in the payload's bytes"
    console_label = None
    sends = "at most payload"
    budget = "bytes"
    by_bits = ByBits(
        (("f1", "its F1 on sentences of as many bytes"),),
        legend="sentences that match the question, as many bytes",
        marker="P",
        line=":",
        beside="sentences in that",
    )
