"""Score a model: every method, every bit width, joint rescoring, timings.

Latents are judged as the receiver gets them, as payload bytes. All methods share one prompt
builder, one receiver and one clock (`timing.py`); `methods/` says what they are.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from tqdm import tqdm

from latentwire_fast import wire
from latentwire_fast.config.schema import RunConfig
from latentwire_fast.data.examples import Example
from latentwire_fast.evaluation.coded_text import code_texts
from latentwire_fast.evaluation.encoding import EncodedExamples, encode_examples
from latentwire_fast.evaluation.fitting import fits_not, why_too_long
from latentwire_fast.evaluation.joint import rescore
from latentwire_fast.evaluation.methods.base import (
    EvaluationCase,
    EvaluationMethod,
    evaluation_methods,
)
from latentwire_fast.evaluation.results import EvaluationResults, ReaderResults
from latentwire_fast.evaluation.scoring import Scorer, batches
from latentwire_fast.evaluation.text_compression import TextSizes
from latentwire_fast.evaluation.timing import time_methods
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.readers.decoding import DecodeOptions
from latentwire_fast.readers.lora import base_parameters
from latentwire_fast.readers.reader import Reader
from latentwire_fast.serving import Receiver
from latentwire_fast.serving.payload_batch import Message, payloads_of

logger = logging.getLogger(__name__)


class Evaluator:
    """Scores one model with its readers on a list of examples, by every registered method.

    Args:
        training_texts: of `EvaluationCase`.
        dictionary_texts: of `TextSizes.of`.
        progress: show a progress bar.
    """

    def __init__(
        self,
        config: RunConfig,
        model: Interlingua,
        readers: dict[str, Reader],
        examples: Sequence[Example],
        *,
        training_texts: Sequence[str] = (),
        dictionary_texts: Sequence[str] | str = (),
        progress: bool = True,
    ) -> None:
        self.training_texts = training_texts
        self.dictionary_texts = dictionary_texts
        self.receivers = {name: Receiver.of(model, reader) for name, reader in readers.items()}
        self.config = config
        self.model = model
        self.bits = model.bottleneck_config.bits
        self.examples = [e for e in examples if e.answers]
        wanted = config.evaluation.methods
        self.methods = {
            name: method
            for name, method in evaluation_methods().items()
            if wanted is None or name in wanted
        }
        self.options = DecodeOptions(
            max_new_tokens=config.evaluation.max_new_tokens,
            first_token_temperature=config.evaluation.first_token_temperature,
            first_token_top_p=config.evaluation.first_token_top_p,
            eos_ban_steps=config.evaluation.eos_ban_steps,
            seed=config.seed,
        )
        self.bar = tqdm(disable=not progress, desc="evaluate", unit="batch", dynamic_ncols=True)

    def encode(self, reader: str | None = None) -> dict[int, list[Message]]:
        """Payloads of every example at every bit width, the widest first.

        Args:
            reader: as in `Interlingua.payloads`.
        """
        rates = self.model.bottleneck_config.rates
        wanted = self.config.evaluation.bits
        asked = set(wanted) & set(rates) if set(wanted) & set(rates) or not wanted else set(rates)
        widths = sorted({*asked, self.bits}, reverse=True)
        payloads: dict[int, list[Message]] = {bits: [] for bits in widths}
        for encoded in self._encoded:
            for bits in widths:
                payloads[bits] += encoded.messages(self.model, bits=bits, reader=reader)
        return payloads

    @cached_property
    @torch.no_grad()
    def _encoded(self) -> list[EncodedExamples]:
        """Latents of every example, by batch."""
        length = self.config.scored_chunk_length
        return [
            encode_examples(self.model, [self.examples[i] for i in rows], chunk_length=length)
            for rows in self._batches()
        ]

    @torch.no_grad()
    def run(self) -> EvaluationResults:
        """Score everything."""
        payloads = self.encode()
        results = EvaluationResults(self.config, self.examples, _sizes(payloads))
        results.payloads = payloads[self.bits]
        texts = [results.replaced_text(example) for example in self.examples]
        results.text_sizes = TextSizes.of(texts, training_texts=self.dictionary_texts)
        single = (p for message in results.payloads for p in payloads_of(message))
        results.latents = [*map(self.model.latents_of, single)]
        cases = {}
        for name, receiver in self.receivers.items():
            alone = self.encode(name) if self.model.slots.private else {}
            if alone:
                results.sizes_alone[name] = _sizes(alone)
            cases[name] = EvaluationCase(
                self.model,
                receiver.reader,
                self.examples,
                payloads,
                training_texts=self.training_texts,
                alone=alone,
                chunk_length=self.config.scored_chunk_length,
                hybrid_tokens=self.config.evaluation.hybrid_tokens,
            )
        results.not_measured = self._not_measured(next(iter(cases.values())))
        for name, case in cases.items():
            if case.reader.lora is not None:
                of = sum(weight.numel() for _, weight in base_parameters(case.reader.model))
                results.lora[name] = {"parameters": case.reader.lora.size, "of": of}
        usable = {
            reader: self._fitting(case, results.not_measured) for reader, case in cases.items()
        }
        rounds = 0
        for methods in usable.values():
            by_bits = sum(method.by_bits is not None for method in methods.values())
            rounds += len(methods) + by_bits * (len(payloads) - 1)
        self.bar.reset(total=rounds * len(self._batches()))
        for name, case in cases.items():
            results.readers[name] = self._reader_results(case, usable[name])
        self._rescore(results, payloads[self.bits])
        self.bar.close()
        return results

    def _batches(self) -> list[range]:
        return list(batches(len(self.examples), self.config.evaluation.batch_size))

    def _not_measured(self, case: EvaluationCase) -> dict[str, str]:
        """The reasons why methods cannot be measured on these examples, by method name."""
        reasons = {name: method.not_measured(case) for name, method in self.methods.items()}
        found = {name: reason for name, reason in reasons.items() if reason}
        for name, reason in found.items():
            logger.warning("%s is not measured: %s", name, reason)
        return found

    def _fitting(
        self, case: EvaluationCase, not_measured: dict[str, str]
    ) -> dict[str, EvaluationMethod]:
        """The methods that one reader has the positions for; adds the reasons of the others.

        Raises:
            DataError: it has none for a latent.
        """
        usable = {}
        for name, method in self.methods.items():
            if name in not_measured and not fits_not(not_measured[name]):
                continue  # on these examples, whichever the reader
            if not method.fits(case):
                continue
            reason = why_too_long(case, method, bits=self.bits)
            if reason is None:
                usable[name] = method
            else:
                logger.warning("%s is not measured: %s", name, reason)
                not_measured[name] = "; ".join(filter(None, [not_measured.get(name), reason]))
        return usable

    def _reader_results(
        self, case: EvaluationCase, methods: dict[str, EvaluationMethod]
    ) -> ReaderResults:
        """Everything that is measured with one reader."""
        name = case.reader.name
        receiver = self.receivers[name]
        scorer = Scorer(
            case, receiver, self.options, self.config.evaluation.batch_size, self.bar.update
        )
        results = ReaderResults()
        for key, method in methods.items():
            self.bar.set_postfix_str(f"{name}: {key}")
            results.methods[key] = scorer.score(method, bits=self.bits)
            results.methods[key].facts = method.facts(case)
        for bits in case.payloads:
            self.bar.set_postfix_str(f"{name}: {bits} bits")
            for key, method in methods.items():
                if method.by_bits:
                    of_method = results.by_bits.setdefault(key, {})
                    is_run = bits == self.bits
                    of_method[bits] = (
                        results.methods[key] if is_run else scorer.decode(method, bits=bits)
                    )
        times = time_methods(
            case,
            receiver,
            {key: method for key, method in methods.items() if method.is_timed},
            count=self.config.evaluation.timing_examples,
            bits=self.bits,
            options=self.options,
        )
        for key, (prefill, end_to_end) in times.items():
            results.methods[key].prefill_ms = prefill
            results.methods[key].end_to_end_ms = end_to_end
        self.bar.set_postfix_str(f"{name}: texts coded by it")
        count = self.config.evaluation.timing_examples
        results.coded = code_texts(case, receiver, bits=self.bits, count=count)
        return results

    def _rescore(self, results: EvaluationResults, payloads: Sequence[Message]) -> None:
        """Joint rescoring, with two readers or more."""
        if len(self.receivers) > 1:
            results.joint = rescore(
                self.receivers,
                self.examples,
                mode=self.model.mode,
                payloads=payloads,
                answers={n: r.methods["latent"].predictions for n, r in results.readers.items()},
                batch_size=self.config.evaluation.batch_size,
            )


def _sizes(payloads: Mapping[int, Sequence[Message]]) -> dict[int, list[int]]:
    """Bytes that are sent of each example, by bit width."""
    return {bits: [*map(wire.payload_bytes, items)] for bits, items in payloads.items()}
