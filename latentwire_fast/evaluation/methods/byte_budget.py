"""The text cut to as many bytes as the payload has."""

from __future__ import annotations

from dataclasses import dataclass

from latentwire_fast.evaluation.methods.base import (
    ByBits,
    EvaluationCase,
    EvaluationMethod,
    MethodConfig,
    MethodInput,
    cut_utf8,
    text_input,
)
from latentwire_fast.prompts.builder import full_text


class ByteBudget(EvaluationMethod):
    """The longest text that fits into the payload's bytes: of the whole prompt (pure mode), or of
    the context (context mode)."""

    @dataclass(frozen=True)
    class Config(MethodConfig):
        """No settings."""

    label, note, kind = "Byte budget", "the prompt cut to the payload's bytes", "budget"
    sends = "at most payload"
    is_timed = True
    by_bits = ByBits(
        (("f1", "its F1 on text cut to as many bytes"),),
        legend="text cut to the payload's bytes",
        marker="v",
        line=":",
        beside="text cut to that",
    )

    def build(self, case: EvaluationCase, rows: range, *, bits: int) -> MethodInput:
        """The text's first bytes."""
        cut = []
        for i in rows:
            example, size = case.examples[i], case.payload_size(i, bits=bits)
            if case.mode == "pure":
                text = cut_utf8(full_text(example.context, example.question), size)
            else:  # the label and the question are free
                text = full_text(cut_utf8(example.context, size), example.question)
            cut.append(case.reader.prompts.text_ids(text))
        return text_input(case, rows, cut)
