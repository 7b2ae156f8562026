"""Ragged prompts and latent prefixes to one padded batch, for readers and LM encoders alike.

Shapes: B rows, T positions, D embedding width, N scored tokens, M prefix positions.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from latentwire_fast.errors import ConfigError
from latentwire_fast.prompts import Prompt

PaddingSide = Literal["left", "right"]


@dataclass
class PromptBatch:
    """Padded inputs of a causal LM.

    Attributes:
        ids_BT: token ids, pad id at prefix and padding positions.
        embeds_BTD: input embeddings with the prefixes in place; None when there is no prefix.
        mask_BT: True at real positions.
        positions_BT: position ids, counted over real positions.
        rows_N, cols_N: the positions whose next-token prediction is scored.
        labels_N: the token ids they should predict.
        step_N: index of that token within its answer.
        places_P2: (row, column) of every prefix position, in prefix order.
        side: where the padding is.
    """

    ids_BT: Tensor
    embeds_BTD: Tensor | None
    mask_BT: Tensor
    positions_BT: Tensor
    rows_N: Tensor
    cols_N: Tensor
    labels_N: Tensor
    step_N: Tensor
    places_P2: Tensor
    side: PaddingSide

    @property
    def lengths_B(self) -> Tensor:
        """Real positions per row."""
        return self.mask_BT.sum(1)

    def model_inputs(self) -> dict[str, Tensor | None]:
        """Arguments of a forward pass over the whole batch.

        Right padding needs no mask under causal attention, and without one the fast kernels run.
        """
        inputs: dict[str, Tensor | None] = {
            "position_ids": self.positions_BT,
            "attention_mask": None if self.side == "right" else self.mask_BT.long(),
        }
        if self.embeds_BTD is None:
            inputs["input_ids"] = self.ids_BT
        else:
            inputs["inputs_embeds"] = self.embeds_BTD
        return inputs


def collate(
    prompts: Sequence[Prompt],
    *,
    embedding: nn.Embedding,
    pad_id: int,
    prefixes: Sequence[Tensor] | Tensor | None = None,
    side: PaddingSide = "right",
) -> PromptBatch:
    """Pad prompts, with row i's prefix `[M_i, D]` before its `ids[latent_at]`.

    Raises:
        ConfigError: a prompt with a latent place came without a prefix, or the other way round.
    """
    sizes = [0] * len(prompts) if prefixes is None else [len(p) for p in prefixes]
    if any((p.latent_at is None) != (prefixes is None) for p in prompts):
        raise ConfigError(
            "prefixes and prompts do not match: a prompt built with `latent=` needs a prefix, "
            "a text prompt takes none"
        )
    lengths = [len(p.ids) + m for p, m in zip(prompts, sizes, strict=True)]
    width = max(lengths)
    ids = torch.full((len(prompts), width), pad_id)
    mask = torch.zeros(len(prompts), width, dtype=torch.bool)
    scored: list[tuple[int, int, int, int]] = []
    places: list[tuple[int, int]] = []
    for b, (prompt, m, length) in enumerate(zip(prompts, sizes, lengths, strict=True)):
        start = width - length if side == "left" else 0
        at = prompt.latent_at
        slots = at if isinstance(at, list) else [at or 0] * m
        # the column of an id: its index and the prefix vectors that stand before it
        columns = [start + i + bisect_right(slots, i) for i in range(len(prompt.ids))]
        ids[b, columns] = torch.tensor(prompt.ids, dtype=torch.long)
        mask[b, start : start + length] = True
        places += [(b, start + slot + j) for j, slot in enumerate(slots)]
        step = 0
        for i, is_target in enumerate(prompt.is_target):
            step = step if is_target else 0
            if is_target:
                scored.append((b, columns[i] - 1, prompt.ids[i], step))
                step += 1
    device = embedding.weight.device
    rows, cols, labels, steps = (
        torch.tensor(scored, dtype=torch.long, device=device).view(-1, 4).unbind(1)
    )
    ids, mask = ids.to(device), mask.to(device)
    where = torch.tensor(places, dtype=torch.long, device=device).view(-1, 2)
    embeds = None
    if prefixes is not None:
        flat = prefixes.flatten(0, 1) if isinstance(prefixes, Tensor) else torch.cat([*prefixes])
        embeds = embedding(ids)
        embeds = embeds.index_put((where[:, 0], where[:, 1]), flat.to(embeds))
    return PromptBatch(
        ids_BT=ids,
        embeds_BTD=embeds,
        mask_BT=mask,
        positions_BT=(mask.long().cumsum(1) - 1).clamp(min=0),
        rows_N=rows,
        cols_N=cols,
        labels_N=labels,
        step_N=steps,
        places_P2=where,
        side=side,
    )
