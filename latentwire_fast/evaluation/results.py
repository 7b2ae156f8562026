"""What an evaluation found, as metrics.json and as the records of predictions.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from latentwire_fast import wire
from latentwire_fast.config.schema import RunConfig
from latentwire_fast.data.examples import Example
from latentwire_fast.evaluation import metrics as scores
from latentwire_fast.evaluation.hypotheses import judge
from latentwire_fast.evaluation.method_result import BY_BITS, MethodResult, mean
from latentwire_fast.prompts.builder import replaced_text


@dataclass
class Outcome:
    """Results of one model with its readers on some examples.

    Attributes:
        payload_sizes: per bit width, the bytes of each example's payload.
        results: per reader and method.
        by_bits: per reader and bit width.
        budget_by_bits: the same for the text cut to as many bytes.
        joint: joint rescoring, with two readers or more.
        joint_scores: per example, each reader's candidate's total score.
    """

    config: RunConfig
    examples: Sequence[Example]
    payload_sizes: dict[int, list[int]]
    results: dict[str, dict[str, MethodResult]] = field(default_factory=dict)
    by_bits: dict[str, dict[int, MethodResult]] = field(default_factory=dict)
    budget_by_bits: dict[str, dict[int, MethodResult]] = field(default_factory=dict)
    joint: MethodResult | None = None
    joint_scores: list[dict[str, float]] = field(default_factory=list)

    def replaced_text(self, example: Example) -> str:
        """The text that the payload stands for."""
        return replaced_text(example.context, example.question, mode=self.config.mode)

    def metrics(self) -> dict[str, Any]:
        """metrics.json but for `schema_version` and `run`."""
        options = {"seed": self.config.seed, "resamples": self.config.evaluation.resamples}
        texts = [self.replaced_text(e) for e in self.examples]
        brotli = [wire.brotli_bytes(t) for t in texts]
        encoder, bottleneck = self.config.encoder, self.config.bottleneck
        measured: dict[str, Any] = {
            "examples": len(self.examples),
            "latent": {
                "M": encoder.latents,
                "d_z": encoder.d_z,
                "bits": bottleneck.bits,
                "group_size": getattr(bottleneck, "group_size", None),
            },
            "bytes": {
                "text_utf8_mean": mean([wire.utf8_bytes(t) for t in texts]),
                "text_brotli_mean": mean(brotli),
                "payload_mean": {str(b): mean(v) for b, v in self.payload_sizes.items()},
            },
            "readers": {name: self._reader_entry(name, options) for name in self.results},
            "joint": self._joint_entry(),
        }
        measured["hypotheses"] = judge(
            measured,
            self.results,
            self.by_bits,
            self.joint,
            payload_sizes=self.payload_sizes,
            brotli_sizes=brotli,
            unseen=self.config.base is not None,
            **options,
        )
        return measured

    def _reader_entry(self, name: str, options: dict[str, int]) -> dict[str, Any]:
        entry: dict[str, Any] = {
            method: result.intervals(**options) for method, result in self.results[name].items()
        }
        for key, widths in self._widths(name).items():
            entry[key] = {
                str(bits): {"f1": mean(result.f1), "em": mean(result.em)}
                for bits, result in widths.items()
            }
        return entry

    def _widths(self, name: str) -> dict[str, dict[int, MethodResult]]:
        """What is measured at every bit width, by its key in the files (`BY_BITS`)."""
        return dict(zip(BY_BITS, (self.by_bits[name], self.budget_by_bits[name]), strict=True))

    def _joint_entry(self) -> dict[str, float] | None:
        if self.joint is None:
            return None
        latent = [methods["latent"] for methods in self.results.values()]
        agree = [
            len({scores.normalize_answer(r.predictions[i]) for r in latent}) == 1
            for i in range(len(self.examples))
        ]
        return {
            "f1": mean(self.joint.f1),
            "best_single_f1": max(mean(r.f1) for r in latent),
            "agreement": mean(agree),
            "oracle_f1": mean([max(v) for v in zip(*(r.f1 for r in latent), strict=True)]),
        }

    def records(self) -> list[dict[str, Any]]:
        """One record per example, as in predictions.jsonl."""
        return [self._record(i, example) for i, example in enumerate(self.examples)]

    def _record(self, i: int, example: Example) -> dict[str, Any]:
        text = self.replaced_text(example)
        readers: dict[str, Any] = {}
        for name, methods in self.results.items():
            readers[name] = {method: result.example(i) for method, result in methods.items()}
            for key, widths in self._widths(name).items():
                readers[name][key] = {str(b): result.scores_of(i) for b, result in widths.items()}
        joint = None
        if self.joint is not None:
            joint = {**self.joint.scores_of(i), "scores": self.joint_scores[i]}
        return {
            "id": example.id,
            "context": example.context,
            "question": example.question,
            "answers": list(example.answers),
            "text_utf8_bytes": wire.utf8_bytes(text),
            "text_brotli_bytes": wire.brotli_bytes(text),
            "payload_bytes": {str(b): sizes[i] for b, sizes in self.payload_sizes.items()},
            "readers": readers,
            "joint": joint,
        }
