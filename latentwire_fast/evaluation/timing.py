"""Times of methods: to the first token, and from the text to the answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import NamedTuple

import torch

from latentwire_fast.evaluation.encoding import encode_examples
from latentwire_fast.evaluation.methods.base import (
    EvaluationCase,
    EvaluationMethod,
    MethodInput,
    unanswered,
)
from latentwire_fast.readers.decoding import DecodeOptions
from latentwire_fast.serving import Receiver
from latentwire_fast.serving.payload_batch import Message

WARM_UPS = 2


class Times(NamedTuple):
    """Median milliseconds of a method with one prompt at a time.

    Attributes:
        prefill: the receiver's way to the first token's logits, from token ids or payload bytes.
        end_to_end: from the text to the answer: where a payload is sent, the sender's encoder
            counts too.
    """

    prefill: float
    end_to_end: float


def milliseconds(call: Callable[..., object], *arguments: object, device: torch.device) -> float:
    """How long a call takes until its device is done."""
    start = time.perf_counter()
    call(*arguments)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def time_methods(
    case: EvaluationCase,
    receiver: Receiver,
    methods: Mapping[str, EvaluationMethod],
    *,
    count: int,
    bits: int,
    options: DecodeOptions,
) -> dict[str, Times]:
    """Times of some methods on the first `count` examples, the methods in turn on each example."""
    clock = _Clock(case, receiver, bits=bits, options=options)
    times: dict[str, list[Times]] = {name: [] for name in methods}
    for i in range(-WARM_UPS, min(count, len(case.examples))):
        for name, method in methods.items():
            found = clock.time(method, max(i, 0))
            if i >= 0:
                times[name].append(found)
    return {
        name: Times(*(median(values) for values in zip(*found, strict=True)))
        for name, found in times.items()
    }


class _Clock:
    """Times one example by one method."""

    def __init__(
        self, case: EvaluationCase, receiver: Receiver, *, bits: int, options: DecodeOptions
    ) -> None:
        self.case, self.receiver = case, receiver
        self.bits, self.options = bits, options

    def time(self, method: EvaluationMethod, i: int) -> Times:
        """Both times of example `i`."""
        single = replace(
            self.case,
            examples=[self.case.examples[i]],
            payloads={bits: [items[i]] for bits, items in self.case.payloads.items()},
        )
        inputs = method.build(single, range(1), bits=self.bits)
        prompts = [unanswered(inputs.prompts[0])]

        def prefill() -> object:
            return self.receiver.prefill(
                prompts, payloads=inputs.payloads, embeddings=inputs.embeddings
            )

        with method.reading(single, inputs):
            return Times(
                self._milliseconds(prefill), self._milliseconds(self._answer, method, single)
            )

    def _answer(self, method: EvaluationMethod, single: EvaluationCase) -> str:
        """One example from its text to the answer."""
        inputs = method.build(single, range(1), bits=self.bits)
        ids = self.receiver.generate(
            [unanswered(inputs.prompts[0])],
            payloads=self._sent(inputs, single),
            embeddings=inputs.embeddings,
            options=self.options,
        )
        return single.reader.decode(ids[0])

    def _sent(self, inputs: MethodInput, single: EvaluationCase) -> Sequence[Message] | None:
        """The payload that the sender makes now; None where the method takes none."""
        if inputs.payloads is None:
            return None
        length = single.chunk_length
        encoded = encode_examples(single.model, single.examples, chunk_length=length)
        return encoded.messages(single.model, bits=self.bits)

    def _milliseconds(self, call: Callable[..., object], *arguments: object) -> float:
        return milliseconds(call, *arguments, device=self.case.reader.device)
