"""A model's input embeddings as the model itself sees them: what the module returns, not its table.

Some families scale inside the module (Gemma by the square root of the width: on its 270M model the
table has a root mean square of 0.0408, what the model reads 1.031), so the raw table says nothing
of the size or the values that stand in `inputs_embeds`.

Shapes: V vocabulary, v some of it, D embedding width, `...` any leading dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

CHUNK = 1 << 20  # values looked up at a time: 4 MiB in fp32, whatever the vocabulary


class EmbeddingSize(NamedTuple):
    """Root mean square and standard deviation over all values of the embeddings of all tokens."""

    rms: float
    std: float


def input_embedding(model: PreTrainedModel) -> nn.Embedding:
    """The module that turns token ids into `inputs_embeds` `[..., D]`."""
    return cast(nn.Embedding, model.get_input_embeddings())


@torch.no_grad()
def embedding_size(embedding: nn.Embedding) -> EmbeddingSize:
    """How large the embeddings are that a model is given, over its whole vocabulary."""
    count, total, squares = 0, 0.0, 0.0
    for _, rows_vD in _in_chunks(embedding):
        values = rows_vD.float()
        count += values.numel()
        total += values.sum(dtype=torch.float64).item()
        squares += values.square().sum(dtype=torch.float64).item()
    variance = (squares - total**2 / count) / max(1, count - 1)
    return EmbeddingSize(rms=(squares / count) ** 0.5, std=max(0.0, variance) ** 0.5)


@torch.no_grad()
def channel_moments(embedding: nn.Embedding) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation `[D]` of each channel over the whole vocabulary, fp32."""
    total_D = squares_D = torch.zeros((), dtype=torch.float64)
    count = len(embedding.weight)
    for _, rows_vD in _in_chunks(embedding):
        values = rows_vD.double().cpu()
        total_D, squares_D = total_D + values.sum(0), squares_D + values.square().sum(0)
    mean_D = total_D / count
    variance_D = (squares_D / count - mean_D.square()).clamp(min=0)
    return mean_D.float(), variance_D.sqrt().float()


@torch.no_grad()
def plain_embedding(embedding: nn.Embedding) -> nn.Embedding:
    """A copy in fp32 on the CPU whose table is what the module returns."""
    table_VD = torch.empty(embedding.weight.shape)
    for ids, rows_vD in _in_chunks(embedding):
        table_VD[ids] = rows_vD.float().cpu()
    return nn.Embedding.from_pretrained(table_VD)


def expected_embedding(probs: Tensor, embedding: nn.Embedding) -> Tensor:
    """Mean embedding `[..., D]` of tokens drawn with probabilities `[..., V]`, in their dtype."""
    if type(embedding) is nn.Embedding:  # what it returns is its table
        return probs @ embedding.weight.to(probs.dtype)
    parts = [probs[..., ids] @ rows.to(probs.dtype) for ids, rows in _in_chunks(embedding)]
    return torch.stack(parts).sum(0)


@torch.no_grad()
def nearest_tokens(rows_ND: Tensor, embedding: nn.Embedding) -> tuple[Tensor, Tensor]:
    """The token `[N]` whose embedding has the largest cosine with each row, and that cosine."""
    unit_ND = nn.functional.normalize(rows_ND.float(), dim=-1)
    best_N = torch.full(unit_ND.shape[:1], -torch.inf, device=rows_ND.device)
    ids_N = torch.zeros_like(best_N, dtype=torch.long)
    for ids, rows_vD in _in_chunks(embedding):
        cosines_Nv = unit_ND @ nn.functional.normalize(rows_vD.float(), dim=-1).T
        found_N, places_N = cosines_Nv.max(-1)
        is_better_N = found_N > best_N
        best_N = torch.where(is_better_N, found_N, best_N)
        ids_N = torch.where(is_better_N, places_N + ids.start, ids_N)
    return ids_N, best_N


def _in_chunks(embedding: nn.Embedding) -> Iterator[tuple[slice, Tensor]]:
    """The embeddings `[v, D]` of all tokens, and which tokens they are of."""
    rows, width = embedding.weight.shape
    step = max(1, CHUNK // width)
    for start in range(0, rows, step):
        ids = slice(start, min(start + step, rows))
        yield ids, embedding(torch.arange(ids.start, ids.stop, device=embedding.weight.device))
