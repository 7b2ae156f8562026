"""Scores of one method with one reader: answers decoded, gold answers weighed in one pass.

Readers are asked through their `Receiver`, as a user's program asks them. It decodes payloads batch
by batch, so that never more than one batch of prefixes is held.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field

from latentwire_fast.data.examples import Example
from latentwire_fast.evaluation.method_result import MethodResult
from latentwire_fast.evaluation.methods.base import (
    EvaluationCase,
    EvaluationMethod,
    MethodInput,
    unanswered,
)
from latentwire_fast.evaluation.metrics import exact_match, f1, first_token_hit, reciprocal_rank
from latentwire_fast.prompts.builder import Prompt
from latentwire_fast.readers.decoding import DecodeOptions
from latentwire_fast.readers.target_scores import TargetScores
from latentwire_fast.serving import Receiver
from latentwire_fast.serving.payload_batch import Message

TOP_K, RANKED = 5, 10  # of FirstTok@5 and MRR@10
LOGPROB_STEPS = 4  # tokens of the gold answer whose log-probabilities predictions.jsonl holds


def judge_answers(answers: list[str], examples: Sequence[Example]) -> MethodResult:
    """Exact match and F1 of one answer per example."""
    pairs = list(zip(answers, examples, strict=True))
    return MethodResult(
        answers,
        [exact_match(answer, example.answers, example.language) for answer, example in pairs],
        [f1(answer, example.answers, example.language) for answer, example in pairs],
    )


def judge_prompts(
    receiver: Receiver,
    prompts: Sequence[Prompt],
    examples: Sequence[Example],
    *,
    payloads: Sequence[Message] | None = None,
    options: DecodeOptions,
) -> MethodResult:
    """Scores of a reader's answers to one prompt per example, and of the gold answers that the
    prompts end in."""
    ids = receiver.generate([unanswered(p) for p in prompts], payloads=payloads, options=options)
    result = judge_answers([receiver.reader.decode(row) for row in ids], examples)
    add_likelihoods(result, receiver.score(prompts, payloads=payloads))
    return result


def batches(count: int, size: int) -> Iterator[range]:
    """The indices 0 to `count` - 1 in batches of `size`."""
    return (range(i, min(i + size, count)) for i in range(0, count, size))


@dataclass(frozen=True)
class _Reading:
    """What a reader makes of a batch: its answers, and what the gold answers are worth to it."""

    answers: list[str]
    scores: TargetScores | None


@dataclass
class Scorer:
    """Scores methods on the examples of one case.

    A batch of text prompts that another method asked before is not read again: a byte budget above
    a text's size is the whole text.

    Attributes:
        progress: called after every batch.
    """

    case: EvaluationCase
    receiver: Receiver
    options: DecodeOptions
    batch_size: int
    progress: Callable[[], object] = lambda: None
    _known: dict[Hashable, _Reading] = field(default_factory=dict, init=False)

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
            inputs = method.build(self.case, rows, bits=bits)
            likelihoods.positions += inputs.positions
            likelihoods.sent_bytes += inputs.sent_bytes
            if inputs.answers is None:
                reading = self._read(method, inputs, rows, with_likelihoods=with_likelihoods)
                answers += reading.answers
                if with_likelihoods:
                    assert reading.scores is not None
                    add_likelihoods(likelihoods, reading.scores)
            else:
                answers += inputs.answers
            self.progress()
        judged = judge_answers(answers, self.case.examples)
        likelihoods.predictions, likelihoods.em, likelihoods.f1 = answers, judged.em, judged.f1
        return likelihoods

    def _read(
        self, method: EvaluationMethod, inputs: MethodInput, rows: range, *, with_likelihoods: bool
    ) -> _Reading:
        """What the reader makes of a batch, or made of it before."""
        key: Hashable = None
        if inputs.payloads is None and inputs.embeddings is None:
            key = method.with_lora, rows, tuple(tuple(prompt.ids) for prompt in inputs.prompts)
            found = self._known.get(key)
            if found is not None and not (with_likelihoods and found.scores is None):
                return found
        with method.reading(self.case, inputs):
            reading = _Reading(
                self._answers(inputs, rows),
                self._target_scores(inputs) if with_likelihoods else None,
            )
        if key is not None:
            self._known[key] = reading
        return reading

    def _answers(self, inputs: MethodInput, rows: range) -> list[str]:
        ids = self.receiver.generate(
            [unanswered(prompt) for prompt in inputs.prompts],
            payloads=inputs.payloads,
            embeddings=inputs.embeddings,
            options=self.options,
            numbers=rows,
        )
        return [self.case.reader.decode(row) for row in ids]

    def _target_scores(self, inputs: MethodInput) -> TargetScores:
        return self.receiver.score(
            inputs.prompts, payloads=inputs.payloads, embeddings=inputs.embeddings
        )


def add_likelihoods(result: MethodResult, scores: TargetScores) -> None:
    """Append what a batch of gold answers is worth to a method's result."""
    first = (scores.step_N == 0).nonzero()[:, 0]
    ranked_BK = scores.ranked_NK(RANKED).cpu()[first.cpu()].tolist()
    labels = scores.labels_N[first].tolist()
    sure = scores.head.confidence(scores.hidden_ND[first.cpu()], scores.labels_N[first])
    result.first_token_margins += sure.margin_N.tolist()
    result.first_token_entropies += sure.entropy_N.tolist()
    for gold_n, ranked, label in zip(
        scores.by_prompt(scores.gold_N), ranked_BK, labels, strict=True
    ):
        gold = gold_n.tolist()
        result.nll.append(-sum(gold))
        result.tokens.append(len(gold))
        result.gold_logprobs.append(gold[:LOGPROB_STEPS])
        result.first_token_ids.append(ranked[0])
        result.top1.append(first_token_hit(ranked, label, k=1))
        result.top5.append(first_token_hit(ranked, label, k=TOP_K))
        result.reciprocal_ranks.append(reciprocal_rank(ranked, {label}))
