"""The words for methods and hypotheses, in the order in which reports show them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from latentwire_fast.report.values import TIMES


class Method(NamedTuple):
    """How a method is named and explained."""

    label: str
    note: str
    kind: str  # reference, ours, budget or floor: how its row is coloured


METHODS = {
    "text": Method("Full text", "the whole prompt, read as text", "reference"),
    "embedding_replay": Method(
        "Embedding replay", "the text's own embeddings as prefix; equals text", "reference"
    ),
    "latent": Method("Latent", "the payload, at this run's bits", "ours"),
    "token_budget": Method("Token budget", "the prompt cut to M positions", "budget"),
    "token_budget_question": Method(
        "Token budget, question kept", "the context cut to what is left of M", "budget"
    ),
    "byte_budget": Method("Byte budget", "the prompt cut to the payload's bytes", "budget"),
    "closed_book": Method("Closed book", "the question alone", "floor"),
    "shuffled_latent": Method("Shuffled latent", "another example's payload", "floor"),
    "zero_latent": Method("Zero latent", "a payload of zeros", "floor"),
    "first_words": Method("First words", "five words of the context, no model", "floor"),
}
BITS = ("16", "8", "6", "4")


@dataclass(frozen=True)
class Hypothesis:
    """One claim that every report tests. `unit` is `points` for differences of F1, or `ratio`."""

    claim: str
    quantity: str
    unit: str
    needs: str


HYPOTHESES = {
    "H1": Hypothesis(
        f"The latent loses at most 2 points of F1 against text, at 4{TIMES} fewer prefix positions",
        "latent F1 minus text F1",
        "points",
        "text and latent scores",
    ),
    "H2": Hypothesis(
        "The latent is at least 3 points of F1 above the prompt cut to as many positions",
        "latent F1 minus token-budget F1",
        "points",
        "latent and token-budget scores",
    ),
    "H3": Hypothesis(
        f"Gold answers cost at most 1.05{TIMES} the NLL per token that they cost with text",
        "latent NLL over text NLL",
        "ratio",
        "the gold answers' likelihood",
    ),
    "H4": Hypothesis(
        "Rescoring the readers' candidates gains at least 1.5 points of F1 over the better reader",
        "joint F1 minus the best single F1",
        "points",
        "two readers",
    ),
    "H5": Hypothesis(
        "Prefill takes less time and the payload fewer bytes than the text",
        "text prefill time over latent prefill time",
        "ratio",
        "timings",
    ),
    "H6": Hypothesis(
        "The payload is smaller than the brotli-compressed text at 95% of the text's F1",
        "payload bytes over brotli bytes",
        "ratio",
        "payload sizes and scores",
    ),
    "H7": Hypothesis(
        "A reader that the encoder never saw comes within 5 points of F1 with an adapter alone",
        "latent F1 minus text F1 of the added reader",
        "points",
        "a run that adds a reader",
    ),
}
