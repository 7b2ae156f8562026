"""The latent with a hint about the gold answer: what it would be worth to know its length."""

from __future__ import annotations

from dataclasses import dataclass

from latentwire_fast import wire
from latentwire_fast.evaluation.encoding import encode_examples
from latentwire_fast.evaluation.methods.base import (
    EvaluationCase,
    EvaluationMethod,
    MethodConfig,
    MethodInput,
    latent_input,
)


class LatentHinted(EvaluationMethod):
    """Each example's payload, made by a sender who knows how long the gold answer is.

    An oracle: nobody knows that who does not know the answer. The method `latent` sends payloads
    that say "not known".
    """

    @dataclass(frozen=True)
    class Config(MethodConfig):
        """No settings."""

    label, kind = "Latent with hint (oracle)", "ours"
    note = "its sender knows the length of the gold answer"
    console_label = "with hint (oracle)"
    sends = "payload"
    is_optional = True

    def fits(self, case: EvaluationCase) -> bool:
        """Where the encoder gives hints."""
        return case.model.encoder_config.hints

    def build(self, case: EvaluationCase, rows: range, *, bits: int) -> MethodInput:
        """Payloads with hints."""
        examples, encoder = [case.examples[i] for i in rows], case.model.encoder
        latent_BMd = encode_examples(case.model, examples).latent_RMd
        lengths = [[encoder.length_of(example.answers[0])] for example in examples]
        payloads = case.model.payloads(encoder.with_hints(latent_BMd, lengths), bits=bits)
        inputs = latent_input(case, rows, [*payloads])
        inputs.sent_bytes = [*map(wire.payload_bytes, payloads)]
        return inputs
