"""Is it collapsing? Whether payloads of different texts, what readers are given of them, and the
answers that come of it, still differ: over the held-out examples, for metrics.json.

A collapsed latent says the same of every text. It shows as a cosine near 1 and an effective rank
near 1, as soft tokens that stand near a few vocabulary rows, as one first token for all answers.

Shapes: N texts, M latents, P soft tokens, D a reader's width; L layers, H heads.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from latentwire_fast.evaluation.method_result import mean
from latentwire_fast.evaluation.metrics import empty_rate
from latentwire_fast.evaluation.results import EvaluationResults
from latentwire_fast.evaluation.spread import latent_statistics, variance_shares
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.readers.embeddings import nearest_tokens
from latentwire_fast.readers.reader import Reader
from latentwire_fast.serving.payload_batch import payloads_of

TEXTS = 256  # of the held-out texts, at most so many
COMMONEST = 8  # tokens of a list
# Sizes relative to the reader's own; what is above the last edge has a bin too.
RMS_EDGES = (0.25, 0.5, 0.8, 0.95, 1.05, 1.25, 2.0, 4.0)


@torch.no_grad()
def measure_collapse(
    model: Interlingua,
    readers: Mapping[str, Reader],
    results: EvaluationResults,
) -> dict[str, Any]:
    """The entry `collapse` of metrics.json.

    Args:
        results: of the evaluation; equal payloads are counted once.
    """
    single = (p for message in results.payloads for p in payloads_of(message))
    different = list(dict.fromkeys(single))[:TEXTS]
    latent_NMd = model.decode_payloads(different)
    return {
        "texts": len(different),
        "latent": _spread(latent_NMd),
        "readers": {
            name: {
                **_given(model, reader, latent_NMd),
                **_answers(reader, results),
            }
            for name, reader in readers.items()
        },
    }


def _spread(vectors_NMD: Tensor) -> dict[str, Any]:
    """Cosine, rank and spectrum of some vectors of each text."""
    found: dict[str, Any] = {
        name: value if math.isfinite(value) else None
        for name, value in latent_statistics(vectors_NMD).items()
    }
    return {**found, "variance_shares": variance_shares(vectors_NMD)}


def _given(model: Interlingua, reader: Reader, latent_NMd: Tensor) -> dict[str, Any]:
    """What a reader is given of the latents."""
    sizes: dict[str, list[Tensor]] = {}
    prefixes = []
    card = model.cards[reader.name]
    for part_BMd in latent_NMd.split(16):
        soft_BPD = model.prefix(reader.name, part_BMd).float()
        if soft_BPD.shape[1]:
            prefixes.append(soft_BPD.cpu())
            rms_BP = soft_BPD.square().mean(-1).sqrt()
            sizes.setdefault("soft_tokens", []).append(rms_BP.cpu() / card.embedding_rms)
        deep = model.deep_prefix(reader.name, part_BMd)
        if deep is not None:
            own_L2 = torch.tensor(card.kv.rms).clamp(min=1e-12)
            rms_L2BP = deep.float().square().mean((3, 5)).sqrt().cpu()
            for i, name in enumerate(("keys", "values")):
                sizes.setdefault(name, []).append(rms_L2BP[:, i] / own_L2[:, i, None, None])
    found: dict[str, Any] = {
        "rms": {
            name: _histogram(torch.cat([v.flatten() for v in values]))
            for name, values in sizes.items()
        },
    }
    if prefixes:
        prefix_NPD = torch.cat(prefixes)
        found["prefix"] = _spread(prefix_NPD)
        found["nearest"] = _nearest(reader, prefix_NPD)
    return found


def _histogram(values: Tensor) -> dict[str, Any]:
    """Numbers relative to the reader's own as a histogram, with their middle and their ends."""
    edges = torch.tensor(RMS_EDGES)
    counts = torch.bucketize(values, edges).bincount(minlength=len(edges) + 1)
    low, median, high = values.quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
    return {
        "edges": list(RMS_EDGES),
        "counts": counts.tolist(),
        "p5": low,
        "median": median,
        "p95": high,
    }


def _nearest(reader: Reader, prefix_NPD: Tensor) -> dict[str, Any]:
    """The vocabulary rows that soft tokens stand nearest to."""
    rows_nD = prefix_NPD.flatten(0, 1).to(reader.embedding.weight.device)
    ids_n, cosine_n = nearest_tokens(rows_nD, reader.embedding)
    return {
        "cosine": cosine_n.mean().item(),
        "distinct": len(ids_n.unique()) / len(ids_n),
        "commonest": _commonest(ids_n.tolist(), reader),
    }


def _answers(reader: Reader, results: EvaluationResults) -> dict[str, Any]:
    """What a reader says when it reads payloads."""
    latent = results.readers[reader.name].methods["latent"]
    said = [i for i in latent.first_token_ids if i is not None]
    golds = [reader.prompts.target_ids(e.answers[0])[0] for e in results.examples]
    return {
        "empty_rate": empty_rate(latent.predictions),
        "first_tokens": {
            "margin": mean(latent.first_token_margins),
            "predicted_entropy": mean(latent.first_token_entropies),
            "distinct": len(set(said)),
            "entropy": _entropy(said),
            "commonest": _commonest(said, reader),
        },
        "gold_first_tokens": {
            "distinct": len(set(golds)),
            "entropy": _entropy(golds),
            "commonest": _commonest(golds, reader),
        },
    }


def _commonest(ids: Sequence[int], reader: Reader) -> list[list[Any]]:
    """The commonest tokens as text, each with its share."""
    counts = Counter(ids).most_common(COMMONEST)
    return [[cast(str, reader.tokenizer.decode([i])), n / len(ids)] for i, n in counts]


def _entropy(values: Iterable[Hashable]) -> float:
    """Of how often each value comes, in nats."""
    counts = Counter(values)
    total = sum(counts.values())
    return -sum(n / total * math.log(n / total) for n in counts.values())
