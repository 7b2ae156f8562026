"""Per-example results of one method with one reader, and their summary for metrics.json."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from latentwire_fast.evaluation.metrics import (
    distinct_shares,
    mean_interval,
    paired_interval,
    ratio_interval,
)


def mean(values: Sequence[float]) -> float:
    """Plain mean."""
    return sum(values) / len(values)


@dataclass
class MethodResult:
    """Per-example results of one method with one reader.

    Attributes:
        predictions, em, f1: the answer, its exact match and its F1.
        positions: how many positions the prefix, or the text in its place, takes; like all that
            follows, empty where no reader was asked.
        sent_bytes: what is sent in the text's place, of methods that count it themselves.
        first_token_ids: the likeliest first token.
        first_token_margins, first_token_entropies: how sure the reader is of the gold first token
            (`Confidence`).
        top1, top5: whether the gold first token is the likeliest, or among the five likeliest.
        reciprocal_ranks: of the gold first token.
        nll, tokens: negative log-likelihood of the gold answer, and its number of tokens.
        gold_logprobs: log-probabilities of its first tokens.
        prefill_ms, end_to_end_ms: medians over the timed examples.
        facts: of the method (`EvaluationMethod.facts`).
    """

    predictions: list[str]
    em: list[float]
    f1: list[float]
    positions: list[int] = field(default_factory=list)
    sent_bytes: list[int] = field(default_factory=list)
    first_token_ids: list[int | None] = field(default_factory=list)
    first_token_margins: list[float] = field(default_factory=list)
    first_token_entropies: list[float] = field(default_factory=list)
    top1: list[float] = field(default_factory=list)
    top5: list[float] = field(default_factory=list)
    reciprocal_ranks: list[float] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    gold_logprobs: list[list[float]] = field(default_factory=list)
    prefill_ms: float | None = None
    end_to_end_ms: float | None = None
    facts: dict[str, float] = field(default_factory=dict)

    def intervals(
        self, *, seed: int, resamples: int, clusters: Sequence[Hashable] | None = None
    ) -> dict[str, Any]:
        """The method's entry of metrics.json.

        Args:
            clusters: as of `mean_interval`.
        """
        options: dict[str, Any] = {"seed": seed, "resamples": resamples, "clusters": clusters}

        def interval(values: Sequence[float]) -> dict[str, float] | None:
            if not values:
                return None
            return mean_interval(values, **options)._asdict()

        nll = None
        if self.nll:
            nll = ratio_interval(self.nll, self.tokens, **options)._asdict()
        return {
            "f1": interval(self.f1),
            "em": interval(self.em),
            "first_token_top1": interval(self.top1),
            "first_token_top5": interval(self.top5),
            "nll_per_token": nll,
            "diversity": interval(distinct_shares(self.predictions)),
            "prefix_positions_mean": mean(self.positions) if self.positions else None,
            "prefill_ms_p50": self.prefill_ms,
            "end_to_end_ms_p50": self.end_to_end_ms,
            **self.facts,
            **({"sent_bytes_mean": mean(self.sent_bytes)} if self.sent_bytes else {}),
        }

    def minus(self, other: MethodResult, **options: Any) -> dict[str, Any]:
        """This method's scores minus another's on the same examples, with paired intervals.

        NLL per token is there only where both have likelihoods. Less is better for it.

        Args:
            options: of `intervals`.
        """
        nll = None
        if self.nll and other.nll:
            assert self.tokens == other.tokens, "two methods predict the same gold answers"
            difference = [ours - theirs for ours, theirs in zip(self.nll, other.nll, strict=True)]
            nll = ratio_interval(difference, self.tokens, **options)._asdict()
        return {"nll_per_token": nll, "f1": paired_interval(self.f1, other.f1, **options)._asdict()}

    def scores_of(self, i: int) -> dict[str, Any]:
        """Prediction and scores of one example."""
        return {"prediction": self.predictions[i], "em": self.em[i], "f1": self.f1[i]}

    def example(self, i: int) -> dict[str, Any]:
        """Everything known of one example, as in predictions.jsonl."""
        entry = self.scores_of(i)
        if self.positions:
            entry["positions"] = self.positions[i]
        if self.sent_bytes:
            entry["sent_bytes"] = self.sent_bytes[i]
        if self.nll:
            entry["nll"], entry["tokens"] = self.nll[i], self.tokens[i]
            entry["first_token_id"] = self.first_token_ids[i]
            entry["first_token_reciprocal_rank"] = self.reciprocal_ranks[i]
            entry["gold_logprobs"] = self.gold_logprobs[i]
        return entry
