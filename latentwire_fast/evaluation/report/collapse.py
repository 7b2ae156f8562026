"""The page "Is it collapsing?" of a report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from latentwire_fast.evaluation.report.formatting import MISSING, number, percent
from latentwire_fast.evaluation.report.sanity_checks import (
    COLLAPSED_COSINE,
    COLLAPSED_RANK,
    EMPTY_LIMIT,
)

ONE_TOKEN = 2.0  # the commonest first token is so many times as common as that of the gold answers


def collapse_view(metrics: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the templates print; None where it was not measured."""
    found = metrics.get("collapse")
    if not found:
        return None
    signs = list(_signs(found))
    return {
        "texts": found["texts"],
        "signs": signs or ["Nothing here says so: payloads, prefixes and answers differ."],
        "columns": ["Latent", *found["readers"]],
        "rows": [
            {"label": label, "cells": cells}
            for label, cells in _rows(found)
            if any(text != MISSING for text in cells)
        ],
        "tokens": list(_tokens(found["readers"])),
    }


def _signs(found: Mapping[str, Any]) -> Iterator[str]:
    named = {"payloads": found["latent"]} | {
        f"soft tokens of {name}": reader["prefix"]
        for name, reader in found["readers"].items()
        if "prefix" in reader
    }
    for what, spread in named.items():
        rank, cosine = spread["effective_rank"], spread["pairwise_cosine"]
        if rank is not None and rank < COLLAPSED_RANK:
            yield f"The {what} of different texts have effective rank {number(rank)}."
        if cosine is not None and cosine > COLLAPSED_COSINE:
            yield f"The {what} of two texts have cosine {number(cosine, digits=3)} on average."
    for name, reader in found["readers"].items():
        said, gold = reader["first_tokens"]["commonest"], reader["gold_first_tokens"]["commonest"]
        if said and gold and said[0][1] > max(0.2, ONE_TOKEN * gold[0][1]):
            yield (
                f"{name} begins {percent(said[0][1]).text}% of its answers with {said[0][0]!r}; "
                f"the commonest first token of gold answers begins {percent(gold[0][1]).text}%."
            )
        if reader["empty_rate"] > EMPTY_LIMIT:
            yield f"{percent(reader['empty_rate']).text}% of {name}'s answers are empty."


def _rows(found: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Each measure: of the latent, and of every reader."""
    readers = list(found["readers"].values())
    spreads = [found["latent"], *(reader.get("prefix") or {} for reader in readers)]

    def of(values: list[Any], *, digits: int = 2) -> list[str]:
        return [MISSING if v is None else number(v, digits=digits) for v in values]

    yield "Cosine of two texts", of([s.get("pairwise_cosine") for s in spreads], digits=3)
    yield "Effective rank", of([s.get("effective_rank") for s in spreads], digits=1)
    for count in (1, 8):
        shares = [(s.get("variance_shares") or [None])[:count] for s in spreads]
        label = "first direction" if count == 1 else f"first {count} directions"
        # So many texts have no more directions than that: their share is 100 whatever they are.
        is_trivial = found["texts"] - 1 <= count
        totals = [None if is_trivial or None in part else 100 * sum(part) for part in shares]
        yield f"Variance in the {label}, %", of(totals, digits=1)
    for name in ("soft_tokens", "keys", "values"):
        sizes = [(reader["rms"].get(name) or {}) for reader in readers]
        cells = [
            f"{number(s['median'], digits=2)} ({number(s['p5'], digits=2)} to "
            f"{number(s['p95'], digits=2)})"
            if s
            else MISSING
            for s in sizes
        ]
        label = name.replace("_", " ")
        yield f"RMS of {label}, relative to the reader's own", [MISSING, *cells]
    nearest = [reader.get("nearest") or {} for reader in readers]
    yield (
        "Cosine to the nearest vocabulary row",
        [MISSING, *of([n.get("cosine") for n in nearest])],
    )
    for label, key in (
        ("Margin of the gold first token, nats", "margin"),
        ("Entropy of the prediction of a first token, nats", "predicted_entropy"),
    ):
        yield label, [MISSING, *of([reader["first_tokens"].get(key) for reader in readers])]
    for title, key in (("predicted", "first_tokens"), ("gold", "gold_first_tokens")):
        entropies = [reader[key]["entropy"] for reader in readers]
        yield f"Entropy of all {title} first tokens, nats", [MISSING, *of(entropies)]
    empty = [percent(reader["empty_rate"]).text for reader in readers]
    yield "Empty answers, %", [MISSING, *empty]


def _tokens(readers: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """The commonest tokens of each reader, in words."""
    titles = {
        "first_tokens": "First tokens that it predicts",
        "gold_first_tokens": "First tokens of gold answers",
        "nearest": "Vocabulary rows nearest to its soft tokens",
    }
    for name, reader in readers.items():
        for key, title in titles.items():
            commonest = (reader.get(key) or {}).get("commonest") or []
            listed = ", ".join(f"{token!r} {percent(share).text}%" for token, share in commonest)
            if listed:
                yield {"reader": name, "title": title, "listed": listed}
