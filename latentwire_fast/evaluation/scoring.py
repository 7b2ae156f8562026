"""Scores of one method with one reader: answers decoded, gold answers weighed in one pass.

`PayloadReader` is all that the evaluation asks of a reader. Payloads are decoded for one batch at a
time, so that never more than one batch of prefixes is held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentwire_fast.data.examples import Example
from latentwire_fast.evaluation.method_result import MethodResult
from latentwire_fast.evaluation.methods.base import (
    EvaluationCase,
    EvaluationMethod,
    MethodInput,
    unanswered,
)
from latentwire_fast.evaluation.metrics import exact_match, f1, first_token_hit, reciprocal_rank
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.prompts.builder import Prompt
from latentwire_fast.readers.decoding import DecodeOptions
from latentwire_fast.readers.reader import Reader
from latentwire_fast.readers.target_scores import TargetScores

TOP_K, RANKED = 5, 10  # of FirstTok@5 and MRR@10
LOGPROB_STEPS = 4  # tokens of the gold answer whose log-probabilities predictions.jsonl holds


class PayloadReader:
    """A reader that answers from text, from payloads, or from ready soft prefixes.

    Every call takes prompts, and for a prompt with a place for a latent either `payloads` (of one
    bit width) or `embeddings` (`[M_i, D]`), one per prompt.
    """

    def __init__(self, model: Interlingua, reader: Reader) -> None:
        self.model = model
        self.mode = model.mode
        self.reader = reader

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        payloads: Sequence[bytes] | None = None,
        embeddings: Sequence[Tensor] | None = None,
        options: DecodeOptions | None = None,
        numbers: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """Token ids of each answer, without EOS.

        Args:
            numbers: of the examples, see `Reader.generate`.
        """
        inputs = self._inputs(payloads, embeddings)
        return self.reader.generate(prompts, **inputs, options=options, numbers=numbers)

    @torch.no_grad()
    def score(
        self,
        prompts: Sequence[Prompt],
        *,
        payloads: Sequence[bytes] | None = None,
        embeddings: Sequence[Tensor] | None = None,
    ) -> TargetScores:
        """Log-probabilities of the answers that the prompts hold, in one teacher-forced pass."""
        batch = self.reader.collate(prompts, **self._inputs(payloads, embeddings))
        return TargetScores(
            self.reader.target_logprobs(batch),
            batch.labels_N,
            batch.rows_N,
            batch.step_N,
            prompts=len(prompts),
        )

    def prefill(
        self,
        prompts: Sequence[Prompt],
        *,
        payloads: Sequence[bytes] | None = None,
        embeddings: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Logits `[B, V]` of the first new token."""
        return self.reader.first_logits(prompts, **self._inputs(payloads, embeddings))

    @torch.no_grad()
    def _inputs(
        self, payloads: Sequence[bytes] | None, embeddings: Sequence[Tensor] | None
    ) -> dict[str, Any]:
        """What `Reader.collate` takes beside the prompts."""
        if payloads is None:
            return {"prefixes": embeddings}
        latent_BMd = self.model.decode_payloads(payloads)
        return dict(self.model.reader_inputs(self.reader.name, latent_BMd))


def judge_answers(answers: list[str], examples: Sequence[Example]) -> MethodResult:
    """Exact match and F1 of one answer per example."""
    pairs = list(zip(answers, examples, strict=True))
    return MethodResult(
        answers,
        [exact_match(answer, example.answers) for answer, example in pairs],
        [f1(answer, example.answers) for answer, example in pairs],
    )


def batches(count: int, size: int) -> Iterator[range]:
    """The indices 0 to `count` - 1 in batches of `size`."""
    return (range(i, min(i + size, count)) for i in range(0, count, size))


@dataclass
class Scorer:
    """Scores methods on the examples of one case.

    Attributes:
        progress: called after every batch.
    """

    case: EvaluationCase
    receiver: PayloadReader
    options: DecodeOptions
    batch_size: int
    progress: Callable[[], object] = lambda: None

    def score(self, method: EvaluationMethod, *, bits: int) -> MethodResult:
        """Everything that is known of a method: its answers, and the gold answers' likelihoods."""
        return self._run(method, bits, with_likelihoods=True)

    def decode(self, method: EvaluationMethod, *, bits: int) -> MethodResult:
        """The method's answers alone."""
        return self._run(method, bits, with_likelihoods=False)

    def _run(self, method: EvaluationMethod, bits: int, *, with_likelihoods: bool) -> MethodResult:
        answers: list[str] = []
        likelihoods = MethodResult([], [], [])
        for rows in batches(len(self.case.examples), self.batch_size):
            given = method.build(self.case, rows, bits=bits)
            answers += self._answers(given, rows)
            likelihoods.positions += given.positions
            if with_likelihoods and given.answers is None:
                add_likelihoods(likelihoods, self._target_scores(given))
            self.progress()
        judged = judge_answers(answers, self.case.examples)
        likelihoods.predictions, likelihoods.em, likelihoods.f1 = answers, judged.em, judged.f1
        return likelihoods

    def _answers(self, given: MethodInput, rows: range) -> list[str]:
        if given.answers is not None:
            return given.answers
        ids = self.receiver.generate(
            [unanswered(prompt) for prompt in given.prompts],
            payloads=given.payloads,
            embeddings=given.embeddings,
            options=self.options,
            numbers=rows,
        )
        return [self.case.reader.decode(row) for row in ids]

    def _target_scores(self, given: MethodInput) -> TargetScores:
        return self.receiver.score(
            given.prompts, payloads=given.payloads, embeddings=given.embeddings
        )


def add_likelihoods(result: MethodResult, scores: TargetScores) -> None:
    """Append what a batch of gold answers is worth to a method's result."""
    gold_of = scores.by_prompt(scores.gold_N)
    first_BK = scores.ranked_NK(RANKED)[scores.step_N == 0].tolist()
    labels_B = scores.labels_N[scores.step_N == 0].tolist()
    for gold_T, label, ranked in zip(gold_of, labels_B, first_BK, strict=True):
        gold = gold_T.tolist()
        result.nll.append(-sum(gold))
        result.tokens.append(len(gold))
        result.gold_logprobs.append(gold[:LOGPROB_STEPS])
        result.first_token_ids.append(ranked[0])
        result.top1.append(first_token_hit(ranked, label, k=1))
        result.top5.append(first_token_hit(ranked, label, k=TOP_K))
        result.reciprocal_ranks.append(reciprocal_rank(ranked, {label}))
