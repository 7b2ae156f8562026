"""The context without the words that the reader expects, to as many bytes as the payload."""

from __future__ import annotations

from dataclasses import dataclass

from latentwire_fast.evaluation.methods.base import ByBits, MethodConfig
from latentwire_fast.evaluation.methods.selective_context import SelectiveContext


class SelectiveContextBytes(SelectiveContext):
    """`SelectiveContext` with the budget in bytes."""

    @dataclass(frozen=True)
    class Config(MethodConfig):
        """No settings."""

    label = "Pruned text, bytes"
    note = "the words the reader expects least, in the payload's bytes"
    console_label = None
    sends = "at most payload"
    budget = "bytes"
    by_bits = ByBits(
        (("f1", "its F1 on text pruned to as many bytes"),),
        legend="text pruned to the payload's bytes",
        marker="^",
        line="-.",
        beside="text pruned to that",
    )
