"""The words for methods, in the order in which reports show them."""

from __future__ import annotations

from typing import NamedTuple

from latentwire_fast.config import schema


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
BITS = tuple(str(bits) for bits in schema.BITS)
