"""The readers of a run, asked about some examples: answers, likelihoods, first letters.

Every prompt comes from the one builder, and every pass goes through a `Receiver`. Prompts of about
the same length share a batch, so that little of it is padding.

Shapes: B prompts, K temperatures, N scored tokens of a batch, n those of one answer, C answers to
choose from, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from latentwire_fast.config.schema import Mode
from latentwire_fast.data.examples import Example
from latentwire_fast.evaluation.patterns.base import PatternCase
from latentwire_fast.evaluation.patterns.costs import Work, measure
from latentwire_fast.evaluation.patterns.given import Given, GivenTexts
from latentwire_fast.evaluation.scoring import batches
from latentwire_fast.prompts.builder import Prompt, Turn
from latentwire_fast.readers.decoding import DecodeOptions
from latentwire_fast.readers.target_scores import TargetScores
from latentwire_fast.serving import Receiver
from latentwire_fast.serving.payload_batch import Message


@dataclass(frozen=True)
class AnswerLikelihood:
    """What one answer is worth to a reader.

    Attributes:
        logprobs_Kn: log-probabilities of the answer's tokens and, last, that it ends behind them,
            at each temperature.
    """

    logprobs_Kn: np.ndarray

    def total(self, k: int = 0) -> float:
        """Of the answer's own tokens, without its end."""
        return float(self.logprobs_Kn[k, :-1].sum())

    def mean(self, k: int = 0) -> float:
        """Per token, its end among them: what `evaluation/joint.py` compares."""
        return float(self.logprobs_Kn[k].mean())

    @property
    def tokens(self) -> int:
        """How many tokens it has, its end among them."""
        return self.logprobs_Kn.shape[1]


@dataclass(frozen=True)
class AskedReader:
    """One reader, given one thing of each of some examples.

    Attributes:
        messages: a payload for each example; None for text.
        with_context: whether text prompts have the context.
        progress: show a bar.
    """

    receiver: Receiver
    examples: Sequence[Example]
    mode: Mode
    messages: Sequence[Message] | None
    with_context: bool
    batch_size: int
    progress: bool = False

    def only(self, i: int) -> AskedReader:
        """The same reader with example `i` alone."""
        messages = None if self.messages is None else [self.messages[i]]
        return replace(self, examples=[self.examples[i]], messages=messages, progress=False)

    def answers(self, options: DecodeOptions, *, copies: int = 1) -> list[list[str]]:
        """`copies` answers to each example, which differ where the options sample."""
        rows = [i for i in range(len(self.examples)) for _ in range(copies)]
        reader, found = self.receiver.reader, [""] * len(rows)
        prompts = self._prompts([(i, None) for i in rows])
        with self._reading():
            for batch in self._batches(prompts, "answers"):
                ids = self.receiver.generate(
                    [prompts[b] for b in batch],
                    payloads=self._payloads([rows[b] for b in batch]),
                    options=options,
                    numbers=batch,
                )
                for b, row in zip(batch, ids, strict=True):
                    found[b] = reader.decode(row)
        return [found[i : i + copies] for i in range(0, len(found), copies)]

    def likelihoods(
        self, pairs: Sequence[tuple[int, str]], *, temperatures: Sequence[float] = (1.0,)
    ) -> list[AnswerLikelihood]:
        """What answers are worth to the reader.

        Args:
            pairs: the index of an example, and an answer to it.
        """
        prompts = self._prompts(pairs)
        found: dict[int, AnswerLikelihood] = {}
        with self._reading():
            for batch in self._batches(prompts, "scores"):
                scores = self.receiver.score(
                    [prompts[b] for b in batch],
                    payloads=self._payloads([pairs[b][0] for b in batch]),
                )
                gold_NK = gold_at(scores, temperatures).T
                for b, gold_nK in zip(batch, scores.by_prompt(gold_NK), strict=True):
                    found[b] = AnswerLikelihood(gold_nK.T.double().cpu().numpy())
        return [found[b] for b in range(len(pairs))]

    @torch.no_grad()
    def choices(self, answers: Sequence[str]) -> np.ndarray:
        """Log-probabilities `[examples, C]` of one-token answers, such as letters, from one pass
        for all of them; of longer ones from a pass for each."""
        ids = [self.receiver.reader.prompts.answer_ids(answer) for answer in answers]
        if len({tuple(own) for own in ids if len(own) == 1}) < len(answers):
            pairs = [(i, a) for i in range(len(self.examples)) for a in answers]
            totals = [likelihood.total() for likelihood in self.likelihoods(pairs)]
            return np.array(totals).reshape(-1, len(answers))
        prompts = self._prompts([(i, None) for i in range(len(self.examples))])
        found = np.zeros((len(prompts), len(answers)))
        wanted = [own[0] for own in ids]
        with self._reading():
            for batch in self._batches(prompts, "choices"):
                first = self.receiver.prefill(
                    [prompts[b] for b in batch], payloads=self._payloads(batch)
                )
                logits_BV = self.receiver.reader.of_tokens(first.logits_BV).float()
                found[batch] = logits_BV.log_softmax(-1)[:, wanted].double().cpu().numpy()
        return found

    def _prompts(self, pairs: Sequence[tuple[int, str | None]]) -> list[Prompt]:
        builder = self.receiver.reader.prompts
        turns = [Turn(self.examples[i].question, answer) for i, answer in pairs]
        if self.messages is not None:
            return builder.build_many(turns, latent=self.mode)
        contexts = [self.examples[i].context if self.with_context else None for i, _ in pairs]
        return builder.build_many(turns, contexts=contexts)

    def _payloads(self, rows: Sequence[int]) -> list[Message] | None:
        return None if self.messages is None else [self.messages[i] for i in rows]

    def cost(self, work: Callable[[AskedReader, int], object], count: int) -> Work:
        """What `work(reader, i)` costs for each of the first `count` examples, of which the reader
        has one at a time."""
        return measure(lambda i: work(self.only(i), i), count)

    def _batches(self, prompts: Sequence[Prompt], what: str) -> Iterable[list[int]]:
        """Indices of prompts in batches, the longest first: too little memory shows at once."""
        order = sorted(range(len(prompts)), key=lambda b: -len(prompts[b].ids))
        found = [[order[b] for b in rows] for rows in batches(len(order), self.batch_size)]
        label = f"{self.receiver.reader.name}: {what}"
        bar: Iterable[list[int]] = tqdm(
            found, desc=label, unit="batch", disable=not self.progress, leave=False
        )
        return bar

    def _reading(self) -> AbstractContextManager[None]:
        """Text is read by the reader as it was loaded, without a LoRA that was trained for
        latents."""
        return nullcontext() if self.messages is not None else self.receiver.reader.base()


class ReaderPanel:
    """All readers of a case with some examples, whichever thing they are given of them."""

    def __init__(self, case: PatternCase, examples: Sequence[Example]) -> None:
        self.case, self.examples = case, examples
        self.batch_size = case.config.evaluation.batch_size
        self.texts = GivenTexts(
            case.model,
            examples,
            batch_size=self.batch_size,
            chunk_length=case.config.scored_chunk_length,
        )

    def reader(self, name: str, given: Given) -> AskedReader:
        """One reader, given one thing."""
        return AskedReader(
            self.case.receivers[name],
            self.examples,
            self.case.model.mode,
            self.texts.messages(given),
            given == "text",
            self.batch_size,
            self.case.progress,
        )

    def readers(self, given: Given) -> dict[str, AskedReader]:
        """All readers by name, given one thing."""
        return {name: self.reader(name, given) for name in self.case.readers}

    @property
    def timed(self) -> int:
        """How many of the first examples costs are measured on."""
        return min(len(self.examples), self.case.config.evaluation.timing_examples)

    def sender(self, given: Given) -> Work:
        """What the encoder does for one example's text."""
        if given in ("text", "nothing"):
            return Work()
        return measure(lambda i: self.texts.encode([self.examples[i]]), self.timed)


@torch.no_grad()
def gold_at(scores: TargetScores, temperatures: Sequence[float]) -> Tensor:
    """Log-probabilities `[K, N]` of the answers' own tokens, with logits divided by each
    temperature. Where an answer ends, what counts is that it does, with whichever stop token."""
    head, stops = scores.head, [*scores.stop_ids]
    parts = []
    for hidden_nD, labels_n in head.chunks(scores.hidden_ND, scores.labels_N):
        logits_nV = head.logits(hidden_nD)
        labels_n = labels_n.to(logits_nV.device)
        of_chunk = []
        for temperature in temperatures:
            logprobs_nV = (logits_nV / temperature).log_softmax(-1)
            gold_n = logprobs_nV.gather(1, labels_n[:, None])[:, 0]
            if len(stops) > 1:
                ends_n = torch.isin(labels_n, labels_n.new_tensor(stops))
                gold_n = torch.where(ends_n, logprobs_nV[:, stops].logsumexp(-1), gold_n)
            of_chunk.append(gold_n)
        parts.append(torch.stack(of_chunk))
    return torch.cat(parts, 1)
