"""Sanity checks of the numbers: one sentence per finding that makes a result doubtful."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from latentwire_fast.evaluation.methods.base import evaluation_methods
from latentwire_fast.evaluation.metrics import distinct_shares, empty_rate, uniform_nll
from latentwire_fast.evaluation.report.formatting import mean, number, percent, size

Records = Sequence[Mapping[str, Any]]

FEW_EXAMPLES = 100
FLOOR_MARGIN = 0.02  # a control this far above closed book still carries something
WEAK_TEXT_F1 = 0.5
EMPTY_LIMIT = 0.05
COLLAPSED_RANK, COLLAPSED_COSINE = 2.0, 0.95
AUTOENCODING_PLATEAU = 1.5  # the loss waits near 2 before it falls, and must not end there


def find_warnings(
    metrics: Mapping[str, Any], predictions: Records, diagnostics: Records
) -> list[str]:
    """Every doubt that the numbers themselves raise, in a fixed order."""
    found = list(_about_size(metrics))
    for name, methods in (metrics.get("readers") or {}).items():
        found += _about_scores(name, methods, metrics)
        found += _about_predictions(name, predictions)
    found += _about_training(diagnostics)
    return found


def _about_size(metrics: Mapping[str, Any]) -> Iterator[str]:
    count = metrics.get("examples") or 0
    if count < FEW_EXAMPLES:
        yield f"Only {count} examples were evaluated: read the intervals, not the means."
    truncated = metrics.get("truncated")
    if truncated:
        yield (
            f"{truncated['examples']} of {count} texts are longer than the encoder reads: "
            f"{number(100 * truncated['text_share'], digits=2)}% of all text is in no latent, yet "
            "counts in the text's sizes and for what the text baseline reads."
        )
    methods = evaluation_methods()
    for key, reason in (metrics.get("not_measured") or {}).items():
        label = methods[key].label if key in methods else key
        yield f"{label} was not measured: {reason}."
    sizes = metrics.get("bytes") or {}
    bits = str((metrics.get("latent") or {}).get("bits"))
    payload = (sizes.get("payload_mean") or {}).get(bits)
    utf8, brotli = sizes.get("text_utf8_mean"), sizes.get("text_brotli_mean")
    if payload and utf8 and payload >= utf8:
        yield (
            f"The payload ({size(payload)} bytes) is larger than the text ({size(utf8)} bytes): "
            "this is expansion, not compression."
        )
    elif payload and brotli and payload >= brotli:
        yield (
            f"The payload ({size(payload)} bytes at {bits} bits) is larger than the text after "
            f"brotli ({size(brotli)} bytes)."
        )


def _about_scores(
    name: str, methods: Mapping[str, Any], metrics: Mapping[str, Any]
) -> Iterator[str]:
    def score(method: str, key: str = "f1") -> float | None:
        return mean((methods.get(method) or {}).get(key))

    text, closed = score("text"), score("closed_book")
    nll = score("text", "nll_per_token")
    vocab = ((metrics.get("run") or {}).get("vocab_sizes") or {}).get(name)
    if nll is not None and vocab and nll > uniform_nll(vocab):
        yield (
            f"{name}: NLL per token of the text baseline is {number(nll, digits=2)}, above "
            f"ln V = {number(uniform_nll(vocab), digits=2)}, what a uniform guess costs: the "
            "metric is broken or the reader cannot do the task, and H3 means nothing."
        )
    if text is not None and text < WEAK_TEXT_F1:
        yield (
            f"{name}: F1 on the full text is only {percent(text).text}: the reader does not "
            "master the task, and being close to it proves little."
        )
    controls = {key: m.label for key, m in evaluation_methods().items() if m.is_control}
    # Where low-rank updates were trained, they read payloads: what they know alone is no content.
    trained = score("closed_book_lora")
    closed = closed if trained is None else trained
    for method, label in controls.items():
        floor = score(method)
        if floor is not None and closed is not None and floor > closed + FLOOR_MARGIN:
            yield (
                f"{name}: the {label.lower()} scores F1 {percent(floor).text}, above "
                f"closed book ({percent(closed).text}): part of the score does not come from the "
                "payload's content."
            )


def _about_predictions(name: str, predictions: Records) -> Iterator[str]:
    def texts(method: str) -> list[str]:
        methods = [(record.get("readers") or {}).get(name) or {} for record in predictions]
        return [m[method].get("prediction") or "" for m in methods if m.get(method)]

    latent = texts("latent")
    if latent:
        gold = distinct_shares([record["answers"][0] for record in predictions])
        spread, expected = sum(distinct_shares(latent)) / len(latent), sum(gold) / len(gold)
        if spread < expected / 2:
            yield (
                f"{name}: only {percent(spread).text}% of the latent's predictions are distinct, "
                f"against {percent(expected).text}% of the gold answers: the latent may have "
                "collapsed."
            )
        if empty_rate(latent) > EMPTY_LIMIT:
            yield f"{name}: {percent(empty_rate(latent)).text}% of the latent's answers are empty."
    replayed, read = texts("embedding_replay"), texts("text")
    if replayed and len(replayed) == len(read):
        differing = sum(a != b for a, b in zip(replayed, read, strict=True))
        if differing:
            yield (
                f"{name}: embedding replay differs from text on {differing} of {len(read)} "
                "examples: in fp32 the two must agree, so the prefix path changes the input."
            )


def _about_training(diagnostics: Records) -> Iterator[str]:
    latent: Mapping[str, Any] = next(
        (record["latent"] for record in reversed(diagnostics) if record.get("latent")), {}
    )
    rank, cosine = latent.get("effective_rank"), latent.get("pairwise_cosine")
    if rank is not None and rank < COLLAPSED_RANK:
        yield (
            f"The latents of a batch end with effective rank {number(rank)}: they hardly differ "
            "between examples."
        )
    if cosine is not None and cosine > COLLAPSED_COSINE:
        yield (
            f"The latents of two examples end with cosine {number(cosine, digits=3)} on average: "
            "they share most of their direction."
        )
    losses: list[float] = []
    for record in diagnostics:
        logged = (record.get("losses") or {}).items()
        losses += [v for k, v in logged if k.split("/")[0] == "autoencode" and v is not None]
    last = losses[-20:]
    if last and sum(last) / len(last) > AUTOENCODING_PLATEAU:
        yield (
            f"The autoencoding loss ends at {number(sum(last) / len(last), digits=2)}: it did not "
            "leave its plateau, so the latents were never made to hold the text."
        )
