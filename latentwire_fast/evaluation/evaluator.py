"""Score a model: every method, every bit width, joint rescoring, timings.

Latents are judged as the receiver sees them: packed to bytes and decoded again. All methods share
one prompt builder, one decoder and one scorer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from latentwire_fast.config.schema import RunConfig
from latentwire_fast.data.examples import Example
from latentwire_fast.evaluation import metrics as scores
from latentwire_fast.evaluation.method_result import MethodResult
from latentwire_fast.evaluation.methods import MethodInput, Methods, unanswered
from latentwire_fast.evaluation.results import Outcome
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.prompts.builder import Prompt, Turn
from latentwire_fast.readers.decoding import DecodeOptions
from latentwire_fast.readers.reader import Reader

TOP_K, RANKED = 5, 10  # of FirstTok@5 and MRR@10
LOGPROB_STEPS = 4
TIMED = (
    "text",
    "latent",
    "token_budget",
    "token_budget_question",
    "byte_budget",
    "closed_book",
    "embedding_replay",
)


class Evaluator:
    """Scores one model with its readers on a list of examples.

    Args:
        progress: show a progress bar.
    """

    def __init__(
        self,
        config: RunConfig,
        model: Interlingua,
        readers: dict[str, Reader],
        examples: Sequence[Example],
        *,
        progress: bool = True,
    ) -> None:
        for reader in readers.values():
            model.check_reader(reader)
        self.config = config
        self.model = model
        self.readers = readers
        self.examples = [e for e in examples if e.answers]
        self.options = DecodeOptions(
            max_new_tokens=config.evaluation.max_new_tokens,
            first_token_temperature=config.evaluation.first_token_temperature,
            first_token_top_p=config.evaluation.first_token_top_p,
            eos_ban_steps=config.evaluation.eos_ban_steps,
            seed=config.seed,
        )
        self.bar = tqdm(disable=not progress, desc="evaluate", unit="batch", dynamic_ncols=True)

    @torch.no_grad()
    def encode(self) -> dict[int, list[bytes]]:
        """Payloads of every example at every bit width."""
        payloads: dict[int, list[bytes]] = {bits: [] for bits in self._widths()}
        for batch in self._batches(self.examples):
            questions = [e.question for e in batch] if self.model.mode == "pure" else None
            latent = self.model.encode([e.context for e in batch], questions)
            for bits in payloads:
                payloads[bits] += self.model.payloads(latent, bits=bits)
        return payloads

    def _widths(self) -> list[int]:
        return sorted(
            {*self.config.evaluation.bits, self.model.bottleneck_config.bits}, reverse=True
        )

    def _batches(self, items: Sequence[Any]) -> list[Any]:
        size = self.config.evaluation.batch_size
        return [items[i : i + size] for i in range(0, len(items), size)]

    @torch.no_grad()
    def run(self) -> Outcome:
        """Score everything."""
        payloads = self.encode()
        bits = self.model.bottleneck_config.bits
        latents = {b: self.model.decode_payloads(p) for b, p in payloads.items()}
        bytes_by_width = {b: [len(p) for p in v] for b, v in payloads.items()}
        outcome = Outcome(self.config, self.examples, bytes_by_width)
        inputs = {
            name: Methods(
                self.model,
                reader,
                self.examples,
                latents=latents[bits],
                payload_bytes=bytes_by_width[bits],
            )
            for name, reader in self.readers.items()
        }
        rounds = sum(len(methods.table) + 2 * (len(latents) - 1) for methods in inputs.values())
        self.bar.reset(total=rounds * len(self._batches(self.examples)))
        for name, methods in inputs.items():
            reader = self.readers[name]
            results = outcome.results[name] = {}
            for method, build in methods.table.items():
                self.bar.set_postfix_str(f"{name}: {method}")
                results[method] = self._score(reader, build())
            results["first_words"] = self._judge(methods.first_words())
            widths, budgets = {bits: results["latent"]}, {bits: results["byte_budget"]}
            for width in [width for width in latents if width != bits]:
                self.bar.set_postfix_str(f"{name}: {width} bits")
                cut = methods.byte_budget(bytes_by_width[width])
                widths[width] = self._generate(reader, methods.latent(latents[width]))
                budgets[width] = self._generate(reader, cut)
            outcome.by_bits[name] = {width: widths[width] for width in latents}
            outcome.budget_by_bits[name] = {width: budgets[width] for width in latents}
            self._time(reader, latents[bits], payloads[bits], results)
        self._joint(outcome, latents[bits])
        self.bar.close()
        return outcome

    def _judge(self, predictions: list[str]) -> MethodResult:
        answers = [e.answers for e in self.examples]
        return MethodResult(
            predictions,
            [scores.exact_match(p, a) for p, a in zip(predictions, answers, strict=True)],
            [scores.f1(p, a) for p, a in zip(predictions, answers, strict=True)],
        )

    def _generate(self, reader: Reader, given: MethodInput) -> MethodResult:
        predictions: list[str] = []
        for rows in self._batches(range(len(given.prompts))):
            ids = reader.generate(
                [unanswered(given.prompts[i]) for i in rows],
                **given.reader_inputs(rows),
                options=self.options,
                numbers=rows,
            )
            predictions += [reader.decode(row) for row in ids]
            self.bar.update()
        result = self._judge(predictions)
        result.positions = given.positions
        return result

    def _score(self, reader: Reader, given: MethodInput) -> MethodResult:
        """Decode, and score the gold answer in one teacher-forced pass."""
        result = self._generate(reader, given)
        for rows in self._batches(range(len(given.prompts))):
            batch = reader.collate([given.prompts[i] for i in rows], **given.reader_inputs(rows))
            logprobs_NV = reader.target_logprobs(batch)
            gold_N = logprobs_NV.gather(1, batch.labels_N[:, None])[:, 0].tolist()
            ranked_NK = logprobs_NV.topk(RANKED, -1).indices.tolist()
            labels = batch.labels_N.tolist()
            first = (batch.step_N == 0).nonzero()[:, 0].tolist()
            for start, stop in zip(first, [*first[1:], len(labels)], strict=True):
                gold = gold_N[start:stop]
                result.nll.append(-sum(gold))
                result.tokens.append(len(gold))
                result.gold_logprobs.append(gold[:LOGPROB_STEPS])
                result.first_token_ids.append(ranked_NK[start][0])
                ranked = ranked_NK[start]
                result.top1.append(scores.first_token_hit(ranked, labels[start], k=1))
                result.top5.append(scores.first_token_hit(ranked, labels[start], k=TOP_K))
                result.reciprocal_ranks.append(scores.reciprocal_rank(ranked, {labels[start]}))
        return result

    def _time(
        self,
        reader: Reader,
        latents: Tensor,
        payloads: list[bytes],
        results: dict[str, MethodResult],
    ) -> None:
        """Median batch-1 times of every method but the controls, which cost what the latent does.

        Prefill is the receiver's way to the first token's logits: from token ids, or from payload
        bytes. End to end begins with the text, so that the sender's encoder counts too, and ends
        with the answer.
        """
        count = min(self.config.evaluation.timing_examples, len(self.examples))
        prefill: dict[str, list[float]] = {method: [] for method in TIMED}
        whole: dict[str, list[float]] = {method: [] for method in TIMED}
        for i in range(-2, count):  # two warm-ups, then interleaved
            example, payload = self.examples[max(i, 0)], payloads[max(i, 0)]
            single = Methods(
                self.model,
                reader,
                [example],
                latents=latents[max(i, 0)][None],
                payload_bytes=[len(payload)],
            )
            for method in TIMED:
                first = self._clock(reader, self._prefill(single, method, payload))
                answer = self._clock(reader, self._answer, single, method)
                if i >= 0:
                    prefill[method].append(first)
                    whole[method].append(answer)
        for method in TIMED:
            results[method].prefill_ms = median(prefill[method])
            results[method].end_to_end_ms = median(whole[method])

    @staticmethod
    def _clock(reader: Reader, call: Callable[..., object], *arguments: object) -> float:
        """Milliseconds that a call takes."""
        start = time.perf_counter()
        call(*arguments)
        if reader.device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e3

    def _prefill(self, single: Methods, method: str, payload: bytes) -> Callable[[], object]:
        """What one example's receiver does up to the first logits, prepared."""
        reader, given = single.reader, single.table[method]()
        prompts = [unanswered(given.prompts[0])]

        def from_payload() -> Tensor:
            latent = self.model.decode_payloads([payload])
            return reader.first_logits(prompts, **self.model.reader_inputs(reader.name, latent))

        def from_prompt() -> Tensor:
            return reader.first_logits(prompts, **given.reader_inputs(range(1)))

        return from_payload if method == "latent" else from_prompt

    def _answer(self, single: Methods, method: str) -> str:
        """One example from its text to the answer."""
        if method == "latent":
            example = single.examples[0]
            questions = [example.question] if self.model.mode == "pure" else None
            payloads = self.model.payloads(self.model.encode([example.context], questions))
            given = single.latent(self.model.decode_payloads(payloads))
        else:
            given = single.table[method]()
        prompts = [unanswered(given.prompts[0])]
        ids = single.reader.generate(prompts, **given.reader_inputs(range(1)), options=self.options)
        return single.reader.decode(ids[0])

    def _answer_scores(
        self, reader: Reader, latents: Tensor, answers: Sequence[str]
    ) -> list[float]:
        """Mean log-probability per token of one candidate per example, given the latents."""
        values: list[float] = []
        for rows in self._batches(range(len(answers))):
            prompts: list[Prompt] = []
            for i in rows:
                example = self.examples[i]
                turn = [Turn(example.question, answers[i])]
                prompts.append(
                    reader.prompts.build(turn, context=example.context, latent=self.model.mode)
                )
            given = self.model.reader_inputs(reader.name, latents[rows.start : rows.stop])
            batch = reader.collate(prompts, **given)
            gold_N = reader.target_logprobs(batch).gather(1, batch.labels_N[:, None])[:, 0]
            sums = gold_N.new_zeros(len(prompts)).index_add_(0, batch.rows_N, gold_N)
            values += (sums / torch.bincount(batch.rows_N, minlength=len(prompts))).tolist()
        return values

    def _joint(self, outcome: Outcome, latents: Tensor) -> None:
        """Both readers score each other's latent answers; the best total wins."""
        names = list(self.readers)
        if len(names) < 2:
            return
        candidates = [outcome.results[name]["latent"].predictions for name in names]
        totals = []
        for answers in candidates:
            parts = [self._answer_scores(self.readers[n], latents, answers) for n in names]
            totals.append([sum(values) for values in zip(*parts, strict=True)])
        chosen = []
        for i in range(len(self.examples)):
            best = max(range(len(names)), key=lambda c: totals[c][i])
            chosen.append(candidates[best][i])
            outcome.joint_scores.append({n: totals[c][i] for c, n in enumerate(names)})
        outcome.joint = self._judge(chosen)
