"""Ragged prompts and latent prefixes to one padded batch, for readers and LM encoders alike.

Shapes: B rows, T positions, D embedding width, N scored tokens, M prefix positions; a deep prefix
`[L, 2, B or 1, H, P, d_head]` stands before them all, in the cache (`CacheFiller` puts it there).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from latentwire_fast.errors import ConfigError
from latentwire_fast.prompts.builder import Prompt

PaddingSide = Literal["left", "right"]


@dataclass
class PromptBatch:
    """Padded inputs of a causal LM.

    Attributes:
        ids_BT: token ids, pad id at prefix and padding positions.
        embeds_BTD: input embeddings with the prefixes in place; None when there is no prefix.
        mask_BT: True at real positions.
        positions_BT: position ids, counted over the deep prefix and real positions.
        rows_N, cols_N: the positions whose next-token prediction is scored.
        labels_N: the token ids they should predict.
        step_N: index of that token within its answer.
        places_P2: (row, column) of every prefix position, in prefix order.
        side: where the padding is.
        deep: the deep prefix that the cache must hold, if any.
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
    deep: Tensor | None = None

    @property
    def lengths_B(self) -> Tensor:
        """Real positions per row, without the deep prefix."""
        return self.mask_BT.sum(1)

    @property
    def deep_positions(self) -> int:
        """P, how many positions the deep prefix takes."""
        return 0 if self.deep is None else self.deep.shape[4]

    def attention_mask(self) -> Tensor:
        """1 at every position that may be read, `[B, P + T]` int64: the deep prefix comes first."""
        before = self.mask_BT.new_ones(len(self.mask_BT), self.deep_positions)
        return torch.cat([before, self.mask_BT], 1).long()

    def model_inputs(self) -> dict[str, Tensor | None]:
        """Arguments of a forward pass over the whole batch, but for the cache with the deep prefix.

        Right padding needs no mask under causal attention, and without one the fast kernels run.
        """
        inputs: dict[str, Tensor | None] = {
            "position_ids": self.positions_BT,
            "attention_mask": None if self.side == "right" else self.attention_mask(),
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
    deep: Tensor | None = None,
    side: PaddingSide = "right",
) -> PromptBatch:
    """Pad prompts, with row i's prefix `[M_i, D]` before its `ids[latent_at]`.

    Args:
        deep: a deep prefix, for the cache; the prompts' own positions count on from its P.

    Raises:
        ConfigError: a prompt with a latent place came without a prefix, or the other way round; a
            deep prefix for another number of prompts.
    """
    sizes = [0] * len(prompts) if prefixes is None else [len(p) for p in prefixes]
    given = prefixes is not None or deep is not None
    if any((p.latent_at is None) == given for p in prompts):
        raise ConfigError(
            "prefixes and prompts do not match: a prompt built with `latent=` needs a prefix, "
            "a text prompt takes none"
        )
    if deep is not None and deep.shape[2] not in (1, len(prompts)):
        raise ConfigError(f"a deep prefix for {deep.shape[2]} prompts, but {len(prompts)} prompts")
    lengths = [len(p.ids) + m for p, m in zip(prompts, sizes, strict=True)]
    width = max(lengths)
    ids = torch.full((len(prompts), width), pad_id)
    mask = torch.zeros(len(prompts), width, dtype=torch.bool)
    scored: list[tuple[int, int, int, int]] = []
    places: list[tuple[int, int]] = []
    for b, (prompt, m, length) in enumerate(zip(prompts, sizes, lengths, strict=True)):
        start = width - length if side == "left" else 0
        at = prompt.latent_at or 0
        columns = [start + i + (m if i >= at else 0) for i in range(len(prompt.ids))]
        ids[b, columns] = torch.tensor(prompt.ids, dtype=torch.long)
        mask[b, start : start + length] = True
        places += [(b, start + at + j) for j in range(m)]
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
    first = 0 if deep is None else deep.shape[4]
    return PromptBatch(
        ids_BT=ids,
        embeds_BTD=embeds,
        mask_BT=mask,
        positions_BT=first + (mask.long().cumsum(1) - 1).clamp(min=0),
        rows_N=rows,
        cols_N=cols,
        labels_N=labels,
        step_N=steps,
        places_P2=where,
        side=side,
        deep=deep,
    )
