"""The beginning of the context as text, and a latent of the rest."""

from __future__ import annotations

from dataclasses import dataclass, replace

from latentwire_fast import wire
from latentwire_fast.evaluation.encoding import encode_examples
from latentwire_fast.evaluation.methods.base import (
    EvaluationCase,
    EvaluationMethod,
    MethodConfig,
    MethodInput,
    turns,
)
from latentwire_fast.prompts.builder import context_text
from latentwire_fast.readers.reader import Reader


class Hybrid(EvaluationMethod):
    """The context's first tokens as text, whole words of them, then a latent of what follows.

    The text stands before the latent, but behind a deep prefix that is in place: that one begins
    where the text would. Bytes are those of the text (UTF-8) and of the payload. Each reader counts
    in tokens of its own, so that their texts may end at different words.
    """

    @dataclass(frozen=True)
    class Config(MethodConfig):
        """No settings; a run says how many tokens (`evaluation.hybrid_tokens`)."""

    label, note, kind = "Hybrid", "the first tokens as text, a payload of the rest", "ours"
    sends = "both"
    is_optional = True

    def fits(self, case: EvaluationCase) -> bool:
        """In context mode, and where a number of tokens is set."""
        return case.mode == "context" and case.hybrid_tokens is not None

    def build(self, case: EvaluationCase, rows: range, *, bits: int) -> MethodInput:
        """Prompts with both, and payloads of the rests."""
        assert case.hybrid_tokens is not None
        examples, tokens = [case.examples[i] for i in rows], case.hybrid_tokens
        texts = [first_words(case.reader, e.context, tokens=tokens) for e in examples]
        rests = [
            replace(e, context=e.context[len(text) :].strip())
            for e, text in zip(examples, texts, strict=True)
        ]
        encoded = encode_examples(case.model, rests, chunk_length=case.chunk_length)
        payloads = [*encoded.messages(case.model, bits=bits)]
        deep = case.model.attachment(case.reader.name, "deep")
        is_in_place = deep is not None and deep.head_positions > 0
        prompts = [
            case.reader.prompts.build_hybrid(turns(e), text=text, text_first=not is_in_place)
            for e, text in zip(examples, texts, strict=True)
        ]
        plain = [case.reader.prompts.build_hybrid(turns(e), text="") for e in examples]
        return MethodInput(
            prompts,
            [
                len(prompt.ids) - len(without.ids) + case.positions(payload)
                for prompt, without, payload in zip(prompts, plain, payloads, strict=True)
            ],
            payloads=payloads,
            sent_bytes=[
                wire.utf8_bytes(text) + wire.payload_bytes(payload)
                for text, payload in zip(texts, payloads, strict=True)
            ],
        )


def first_words(reader: Reader, context: str, *, tokens: int) -> str:
    """The longest beginning of a context that is whole words and at most so many tokens."""
    label = len(context_text(""))
    ends = [end - label for end in reader.prompts.text_ends(context_text(context)) if end > label]
    if len(ends) <= tokens:
        return context
    end = ends[tokens - 1]
    if not context[end : end + 1].isspace():  # within a word: back to its start
        end = max((i for i in range(end) if context[i].isspace()), default=0)
    return context[:end].rstrip()
