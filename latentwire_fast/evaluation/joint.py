"""Joint rescoring: the readers score each other's answers, and the best total wins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from latentwire_fast.config.schema import Mode
from latentwire_fast.data.examples import Example
from latentwire_fast.evaluation.method_result import MethodResult
from latentwire_fast.evaluation.scoring import batches, judge_answers
from latentwire_fast.prompts.builder import Turn
from latentwire_fast.serving import Receiver
from latentwire_fast.serving.payload_batch import Message


@dataclass(frozen=True)
class JointResult:
    """The readers' common answers.

    Attributes:
        result: the chosen answers.
        totals: per example, the total score of each reader's answer.
    """

    result: MethodResult
    totals: list[dict[str, float]]


def rescore(
    receivers: Mapping[str, Receiver],
    examples: Sequence[Example],
    *,
    mode: Mode,
    payloads: Sequence[Message],
    answers: Mapping[str, Sequence[str]],
    batch_size: int,
) -> JointResult:
    """Choose, per example, the answer that all readers together find likeliest.

    Args:
        mode: what a payload stands for.
        payloads: one per example, or several in its place.
        answers: per reader, its own answer to every example.
    """
    totals: dict[str, list[float]] = {}
    for name, candidates in answers.items():
        scores = [
            _mean_logprobs(receiver, examples, mode, payloads, candidates, batch_size)
            for receiver in receivers.values()
        ]
        totals[name] = [sum(of_example) for of_example in zip(*scores, strict=True)]
    per_example = [{name: totals[name][i] for name in answers} for i in range(len(examples))]
    chosen = [
        answers[max(scores, key=scores.__getitem__)][i] for i, scores in enumerate(per_example)
    ]
    return JointResult(judge_answers(chosen, examples), per_example)


def _mean_logprobs(
    receiver: Receiver,
    examples: Sequence[Example],
    mode: Mode,
    payloads: Sequence[Message],
    candidates: Sequence[str],
    batch_size: int,
) -> list[float]:
    """Mean log-probability per token of one candidate per example, given the payloads."""
    builder = receiver.reader.prompts
    means: list[float] = []
    for rows in batches(len(examples), batch_size):
        prompts = [
            builder.build(
                [Turn(examples[i].question, candidates[i])],
                context=examples[i].context,
                latent=mode,
            )
            for i in rows
        ]
        scores = receiver.score(prompts, payloads=[payloads[i] for i in rows])
        means += scores.mean_gold_B.tolist()
    return means
