"""The files of an evaluation: metrics.json and the records of predictions.jsonl."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from latentwire_fast.config.schema import RunConfig
from latentwire_fast.data.examples import Example
from latentwire_fast.evaluation.coded_text import CodedTexts
from latentwire_fast.evaluation.hypotheses.base import CodedEvidence, Evidence, judge_hypotheses
from latentwire_fast.evaluation.joint import JointResult
from latentwire_fast.evaluation.languages import normalize_answer
from latentwire_fast.evaluation.method_result import MethodResult, mean
from latentwire_fast.evaluation.methods.base import bits_key
from latentwire_fast.evaluation.set_scores import set_scores
from latentwire_fast.evaluation.text_compression import TextSizes
from latentwire_fast.prompts.builder import replaced_text
from latentwire_fast.registry import METHODS
from latentwire_fast.serving.payload_batch import Message


@dataclass
class ReaderResults:
    """Results with one reader.

    Attributes:
        methods: by method, at the run's own bit width.
        by_bits: by method and bit width, for the methods that are scored at every width.
        coded: the texts coded by this reader; None where it cannot.
    """

    methods: dict[str, MethodResult] = field(default_factory=dict)
    by_bits: dict[str, dict[int, MethodResult]] = field(default_factory=dict)
    coded: CodedTexts | None = None


@dataclass
class EvaluationResults:
    """Results of one model with its readers on some examples.

    Attributes:
        payload_sizes: per bit width, the bytes of each example's payload.
        sizes_alone: the same of payloads for one reader alone, by reader, where readers have slots
            of their own.
        text_sizes: bytes of each example's text by every compressor.
        payloads: of the examples, at the run's own bit width.
        latents: M of each of these.
        readers: by reader.
        joint: joint rescoring, with two readers or more.
        not_measured: why methods could not be measured on these examples, by method.
        lora: of readers that are not frozen, the number of parameters that their low-rank updates
            have, and how many parameters they are updates of.
    """

    config: RunConfig
    examples: Sequence[Example]
    payload_sizes: dict[int, list[int]]
    readers: dict[str, ReaderResults] = field(default_factory=dict)
    joint: JointResult | None = None
    not_measured: dict[str, str] = field(default_factory=dict)
    lora: dict[str, dict[str, int]] = field(default_factory=dict)
    text_sizes: TextSizes = field(default_factory=lambda: TextSizes([], [], []))
    payloads: Sequence[Message] = ()
    latents: Sequence[int] = ()
    sizes_alone: dict[str, dict[int, list[int]]] = field(default_factory=dict)

    @property
    def contexts(self) -> list[str]:
        """The examples' contexts."""
        return [example.context for example in self.examples]

    @property
    def _is_mixture(self) -> bool:
        return len({example.set_name for example in self.examples}) > 1

    def replaced_text(self, example: Example) -> str:
        """The text that the payload stands for."""
        return replaced_text(example.context, example.question, mode=self.config.mode)

    def metrics(self) -> dict[str, Any]:
        """metrics.json but for `schema_version` and `run`."""
        evidence = self._evidence()
        encoder, bottleneck = self.config.encoder, self.config.bottleneck
        measured: dict[str, Any] = {
            "examples": len(self.examples),
            "contexts": len(set(self.contexts)),
            "latent": {
                "M": encoder.latents,
                "d_z": encoder.d_z,
                "bits": bottleneck.bits,
                "group_size": getattr(bottleneck, "group_size", None),
            },
            "bytes": {
                **self._text_bytes(),
                "payload_mean": {str(b): mean(v) for b, v in self.payload_sizes.items()},
            },
            "readers": {name: self._reader_entry(r) for name, r in self.readers.items()},
            "latent_minus": {name: self._differences(r) for name, r in self.readers.items()},
            "joint": self._joint_entry(),
            "hypotheses": judge_hypotheses(evidence),
            "coded_text": self._coded_entry(),
        }
        methods = {name: reader.methods for name, reader in self.readers.items()}
        if by_set := set_scores(self.config, self.examples, methods):
            measured["sets"] = by_set
        if self.sizes_alone:
            measured["latent"]["private_slots"] = dict(self.config.private_slots)
            measured["bytes"]["payload_alone_mean"] = {
                name: {str(b): mean(v) for b, v in sizes.items()}
                for name, sizes in self.sizes_alone.items()
            }
        if encoder.varies:
            measured["latent"]["M_mean"] = mean(self.latents)
        if self.config.scored_chunk_length is not None:
            measured["latent"]["chunk_length"] = self.config.scored_chunk_length
            measured["latent"]["payloads_mean"] = mean([len(p) for p in self.payloads])
        if self.not_measured:
            measured["not_measured"] = dict(self.not_measured)
        if self.lora:
            measured["lora"] = dict(self.lora)
        return measured

    def _text_bytes(self) -> dict[str, Any]:
        """Mean bytes of the texts, by compressor and by reader; None where that was not
        measured."""
        sizes = self.text_sizes
        return {
            "text_utf8_mean": mean(sizes.utf8),
            "text_zlib_mean": mean(sizes.zlib),
            "text_zstd_mean": mean(sizes.zstd) if sizes.zstd else None,
            "text_brotli_mean": mean(sizes.brotli),
            "text_zstd_dictionary_mean": (
                mean(sizes.zstd_dictionary) if sizes.zstd_dictionary else None
            ),
            "text_coded_mean": {
                name: None if reader.coded is None else mean(reader.coded.sizes)
                for name, reader in self.readers.items()
            },
        }

    def _coded_entry(self) -> dict[str, Any]:
        """How the texts were coded, by readers and with a dictionary."""
        return {
            "readers": {
                name: None if reader.coded is None else reader.coded.entry(self.text_sizes.utf8)
                for name, reader in self.readers.items()
            },
            "zstd_dictionary": dict(self.text_sizes.dictionary) or None,
            "not_measured": dict(self.text_sizes.not_measured),
        }

    def _evidence(self) -> Evidence:
        coded = {
            name: CodedEvidence(reader.coded.sizes, reader.coded.times.medians())
            for name, reader in self.readers.items()
            if reader.coded is not None
        }
        return Evidence(
            methods={name: reader.methods for name, reader in self.readers.items()},
            by_bits={name: reader.by_bits for name, reader in self.readers.items()},
            joint=None if self.joint is None else self.joint.result,
            bits=self.config.bottleneck.bits,
            payload_sizes=self.payload_sizes,
            utf8_sizes=self.text_sizes.utf8,
            brotli_sizes=self.text_sizes.brotli,
            coded=coded,
            are_added_readers=self.config.base is not None,
            **self._options(),
        )

    def _by_key(
        self,
        reader: ReaderResults,
        of_method: Callable[[MethodResult], Any],
        of_width: Callable[[MethodResult], Any],
    ) -> dict[str, Any]:
        """A reader's part of a file: every method by its name, None where it was not measured; then
        what was measured at every bit width, by its own key."""
        entry = {
            name: of_method(reader.methods[name]) if name in reader.methods else None
            for name in METHODS.names()
            if name in reader.methods or name in self.not_measured
        }
        for name, widths in reader.by_bits.items():
            entry[bits_key(name)] = {str(bits): of_width(r) for bits, r in widths.items()}
        return entry

    def _reader_entry(self, reader: ReaderResults) -> dict[str, Any]:
        options = self._options()
        return self._by_key(
            reader,
            lambda result: result.intervals(**options),
            lambda result: {"f1": mean(result.f1), "em": mean(result.em)},
        )

    def _differences(self, reader: ReaderResults) -> dict[str, Any]:
        """The latent's scores minus those of every other method."""
        latent, options = reader.methods["latent"], self._options()
        return {
            name: latent.minus(result, **options)
            for name, result in reader.methods.items()
            if name != "latent"
        }

    def _options(self) -> dict[str, Any]:
        """Arguments of every interval: the questions on one context are resampled together."""
        return {
            "seed": self.config.seed,
            "resamples": self.config.evaluation.resamples,
            "clusters": self.contexts,
        }

    def _joint_entry(self) -> dict[str, float] | None:
        if self.joint is None:
            return None
        latent = [reader.methods["latent"] for reader in self.readers.values()]
        agree = [
            len({normalize_answer(r.predictions[i], example.language) for r in latent}) == 1
            for i, example in enumerate(self.examples)
        ]
        return {
            "f1": mean(self.joint.result.f1),
            "best_single_f1": max(mean(result.f1) for result in latent),
            "agreement": mean(agree),
            "oracle_f1": mean([max(v) for v in zip(*(r.f1 for r in latent), strict=True)]),
        }

    def records(self) -> list[dict[str, Any]]:
        """One record per example, as in predictions.jsonl."""
        return [self._record(i, example) for i, example in enumerate(self.examples)]

    def _record(self, i: int, example: Example) -> dict[str, Any]:
        joint = None
        if self.joint is not None:
            joint = {**self.joint.result.scores_of(i), "scores": self.joint.totals[i]}
        return {
            "id": example.id,
            **({"set": example.set_name} if self._is_mixture else {}),
            "context": example.context,
            "question": example.question,
            "answers": list(example.answers),
            "text_utf8_bytes": self.text_sizes.utf8[i],
            "text_brotli_bytes": self.text_sizes.brotli[i],
            "payload_bytes": {str(b): sizes[i] for b, sizes in self.payload_sizes.items()},
            "readers": {
                name: self._by_key(
                    reader, lambda result: result.example(i), lambda result: result.scores_of(i)
                )
                for name, reader in self.readers.items()
            },
            "joint": joint,
        }
