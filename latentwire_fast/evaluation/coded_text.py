"""Texts coded by the readers themselves: the honest limit of bytes, and what it costs a receiver.

A payload is held against the shortest form of the text that both sides could use as well: the
reader's own expectations with an arithmetic coder (`evaluation/text_coder.py`). To read that, a
receiver needs one step of the reader per token, and then a prefill of the text; a payload needs a
prefill alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from statistics import median
from typing import Any

from latentwire_fast.errors import PayloadError
from latentwire_fast.evaluation.method_result import mean
from latentwire_fast.evaluation.methods.base import EvaluationCase, turns, unanswered
from latentwire_fast.evaluation.methods.latent import Latent
from latentwire_fast.evaluation.text_coder import TextCoder
from latentwire_fast.evaluation.timing import WARM_UPS, milliseconds
from latentwire_fast.prompts.builder import replaced_text
from latentwire_fast.serving import Receiver

logger = logging.getLogger(__name__)

# What is really coded and decoded, at most: each token is two steps of the reader. Long texts are
# fewer, so that an evaluation does not become as long as two generations of all of them.
SAMPLE, SAMPLE_TOKENS = 8, 512


@dataclass(frozen=True)
class FirstTokenTimes:
    """Milliseconds of a receiver to the first token of an answer, each example in turn.

    Attributes:
        payload: from the payload's bytes.
        unpacking: from the coded text's bytes to the text.
        coded_text: that, and the prefill of the text.
    """

    payload: list[float] = field(default_factory=list)
    unpacking: list[float] = field(default_factory=list)
    coded_text: list[float] = field(default_factory=list)

    def medians(self) -> dict[str, float | None]:
        """The median of each."""
        return {name: median(values) if values else None for name, values in vars(self).items()}


@dataclass
class CodedTexts:
    """The texts of an evaluation under one reader.

    Attributes:
        sizes: `-log2 p / 8` of each example's text and its end: bytes, not whole ones.
        tokens: of each.
        lost: how many texts the tokenizer does not give back as they were.
        sample: for some examples, the bytes that a text was really coded to.
        equal: how many of those were decoded to the same text. Fewer where the reader's logits are
            not the same each time.
        times: of these.
    """

    sizes: list[float]
    tokens: list[int]
    lost: int
    sample: list[int] = field(default_factory=list)
    equal: int = 0
    times: FirstTokenTimes = field(default_factory=FirstTokenTimes)

    def entry(self, utf8: Sequence[int]) -> dict[str, Any]:
        """The reader's part of `coded_text` in metrics.json."""
        return {
            "bits_per_byte": 8 * sum(self.sizes) / max(1, sum(utf8)),
            "tokens_mean": mean(self.tokens),
            "lost": self.lost,
            "sample": {
                "examples": len(self.sample),
                "decoded_equal": self.equal,
                "bytes_mean": mean(self.sample),
                "information_mean": mean(self.sizes[: len(self.sample)]),
            },
            "first_token_ms_p50": self.times.medians(),
        }


def code_texts(
    case: EvaluationCase, receiver: Receiver, *, bits: int, count: int
) -> CodedTexts | None:
    """Code the examples' texts by the case's reader, as it was loaded.

    Args:
        bits: of the payloads that are timed beside.
        count: how many are really coded, at most (`sample_size`).

    Returns:
        None where the reader has no positions for a text.
    """
    coder = TextCoder(case.reader, mode=case.mode)
    texts = [replaced_text(e.context, e.question, mode=case.mode) for e in case.examples]
    distinct = list(dict.fromkeys(texts))
    rows = dict(zip(distinct, coder.ids(distinct), strict=True))
    longest = max((coder.positions(ids) for ids in rows.values()), default=0)
    if case.reader.learns_positions and longest > case.reader.max_positions:
        logger.warning("reader %r has no positions to code the texts", case.reader.name)
        return None
    with case.reader.base():
        information = dict(zip(distinct, coder.bits([*rows.values()]), strict=True))
    coded = CodedTexts(
        [information[text] / 8 for text in texts],
        [len(rows[text]) for text in texts],
        sum(coder.text(ids) != text for text, ids in rows.items()),
    )
    trial = _Trial(case, receiver, coder, bits=bits)
    for i, text in enumerate(texts[: sample_size(coded.tokens, count)]):
        with case.reader.base():
            message = coder.encode(rows[text])
        coded.sample.append(len(message))
        for _ in range(WARM_UPS if i == 0 else 0):
            trial.payload(i)
        found = trial.coded_text(i, message, coded.times)
        coded.equal += found == rows[text]
        coded.times.payload.append(trial.payload(i))
    return coded


def sample_size(tokens: Sequence[int], count: int) -> int:
    """How many of the first texts are really coded: at most `count` and `SAMPLE`, and as many as
    have `SAMPLE_TOKENS` together; one at least, if there is any.

    Args:
        tokens: of each text.
    """
    fitting = sum(total <= SAMPLE_TOKENS for total in accumulate(tokens[: min(count, SAMPLE)]))
    return max(fitting, min(1, count, len(tokens)))


class _Trial:
    """Times single examples."""

    def __init__(
        self, case: EvaluationCase, receiver: Receiver, coder: TextCoder, *, bits: int
    ) -> None:
        self.case, self.receiver, self.coder, self.bits = case, receiver, coder, bits
        self._latent = Latent(Latent.Config())

    def payload(self, i: int) -> float:
        """From the bytes of a payload to the first token's logits."""
        inputs = self._latent.build(self.case, range(i, i + 1), bits=self.bits)
        prompts = [unanswered(inputs.prompts[0])]
        return self._milliseconds(lambda: self.receiver.prefill(prompts, payloads=inputs.payloads))

    def coded_text(self, i: int, message: bytes, times: FirstTokenTimes) -> list[int]:
        """From the bytes of a coded text to the first token's logits; the decoded tokens."""
        decoded: list[int] = []

        def prefill() -> None:
            text = self.coder.text(decoded)
            question = [replace(turns(self.case.examples[i])[0], answer=None)]
            builder = self.case.reader.prompts
            if self.case.mode == "pure":
                prompt = builder.build(question, context=None, user_ids=builder.text_ids(text))
            else:
                prompt = builder.build(question, context=text)
            self.receiver.prefill([prompt])

        with self.case.reader.base():
            try:
                unpacking = self._milliseconds(lambda: decoded.extend(self.coder.decode(message)))
            except PayloadError as error:
                logger.warning("reader %r: %s", self.case.reader.name, error)
                return []
            times.unpacking.append(unpacking)
            times.coded_text.append(unpacking + self._milliseconds(prefill))
        return decoded

    def _milliseconds(self, call: Callable[[], object]) -> float:
        return milliseconds(call, device=self.case.reader.device)
