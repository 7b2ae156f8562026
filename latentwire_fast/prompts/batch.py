"""Ragged prompts and latent prefixes to one padded batch, for readers and LM encoders alike.

Shapes: B rows, T positions, D embedding width, N scored tokens, M prefix positions of a row, P
those of all rows together. A deep prefix `[L, 2, B or 1, H, positions, d_head]` stands before them
all, in the cache (`CacheFiller` puts it there). Where rows have deep prefixes of several lengths, a
shorter one has its padding first, so that it ends where the prompt begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from latentwire_fast.errors import ConfigError
from latentwire_fast.prompts.builder import Prompt

PaddingSide = Literal["left", "right"]
# Hidden states [B, T, D] behind a decoder layer to what the next one gets, by that layer's number.
LayerUpdates = Mapping[int, Callable[[Tensor], Tensor]]


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
        layers: what changes the hidden states between the layers, if anything does.
        deep_lengths_B: how many of its positions are real in each row, the last ones; None: all.
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
    layers: LayerUpdates | None = None
    deep_lengths_B: Tensor | None = None

    @property
    def lengths_B(self) -> Tensor:
        """Real positions per row, without the deep prefix."""
        return self.mask_BT.sum(1)

    @property
    def deep_positions(self) -> int:
        """The number of positions that the deep prefix takes."""
        return 0 if self.deep is None else self.deep.shape[4]

    @property
    def needs_mask(self) -> bool:
        """Whether there is padding before a real position."""
        return self.side == "left" or self.deep_lengths_B is not None

    def attention_mask(self) -> Tensor:
        """1 where a position may be read, int64 `[B, deep positions + T]`, the deep ones first."""
        before = self.mask_BT.new_ones(len(self.mask_BT), self.deep_positions)
        if self.deep_lengths_B is not None:
            column_P = torch.arange(self.deep_positions, 0, -1, device=before.device)
            before = column_P <= self.deep_lengths_B[:, None]
        return torch.cat([before, self.mask_BT], 1).long()

    def model_inputs(self) -> dict[str, Tensor | None]:
        """Arguments of a forward pass over the whole batch, but for the cache with the deep prefix.

        Right padding needs no mask under causal attention, and without one the fast kernels run.
        """
        inputs: dict[str, Tensor | None] = {
            "position_ids": self.positions_BT,
            "attention_mask": self.attention_mask() if self.needs_mask else None,
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
    layers: LayerUpdates | None = None,
    deep_lengths: Sequence[int] | None = None,
    side: PaddingSide = "right",
) -> PromptBatch:
    """Pad prompts, with row i's prefix `[M_i, D]` before its `ids[latent_at]`.

    Args:
        deep: a deep prefix, for the cache; the prompts' own positions count on behind it.
        layers: updates of hidden states, which take no positions.
        deep_lengths: how many of its positions are real in each row, the last ones; None: all.

    Raises:
        ConfigError: a prompt with a latent place came without a prefix, or the other way round; a
            deep prefix for another number of prompts.
    """
    given = (prefixes, deep, layers)
    _check_prefixes(prompts, has_prefix=any(x is not None for x in given), deep=deep)
    sizes_B = [0] * len(prompts) if prefixes is None else [len(prefix) for prefix in prefixes]
    lengths_B = [len(p.ids) + size for p, size in zip(prompts, sizes_B, strict=True)]
    width = max(lengths_B)  # T
    ids_BT = torch.full((len(prompts), width), pad_id)
    mask_BT = torch.zeros(len(prompts), width, dtype=torch.bool)
    scored: list[tuple[int, int, int, int]] = []  # N of (row, column, label, step)
    places: list[tuple[int, int]] = []  # P of (row, column)
    for b, (prompt, size, length) in enumerate(zip(prompts, sizes_B, lengths_B, strict=True)):
        start = width - length if side == "left" else 0
        at = prompt.latent_at or 0
        # Column of each of the prompt's ids: those from `latent_at` on stand behind the prefix.
        columns = [start + i + (size if i >= at else 0) for i in range(len(prompt.ids))]
        ids_BT[b, columns] = torch.tensor(prompt.ids, dtype=torch.long)
        mask_BT[b, start : start + length] = True
        places += [(b, start + at + j) for j in range(size)]
        scored += [(b, column, label, step) for column, label, step in _scored(prompt, columns)]
    device = embedding.weight.device
    ids_BT, mask_BT = ids_BT.to(device), mask_BT.to(device)
    rows_N, cols_N, labels_N, step_N = _columns(scored, count=4, device=device).unbind(1)
    places_P2 = _columns(places, count=2, device=device)
    embeds_BTD = None
    if prefixes is not None:
        flat_PD = prefixes.flatten(0, 1) if isinstance(prefixes, Tensor) else torch.cat([*prefixes])
        embeds_BTD = embedding(ids_BT)
        embeds_BTD = embeds_BTD.index_put(places_P2.unbind(1), flat_PD.to(embeds_BTD))
    # The position of a prompt's first token.
    first: int | Tensor = 0 if deep is None else deep.shape[4]
    deep_lengths_B = None
    if deep_lengths is not None and len({*deep_lengths}) > 1:
        deep_lengths_B = torch.tensor([*deep_lengths], device=device)
        first = deep_lengths_B[:, None]
    return PromptBatch(
        ids_BT=ids_BT,
        embeds_BTD=embeds_BTD,
        mask_BT=mask_BT,
        positions_BT=first + (mask_BT.long().cumsum(1) - 1).clamp(min=0),
        rows_N=rows_N,
        cols_N=cols_N,
        labels_N=labels_N,
        step_N=step_N,
        places_P2=places_P2,
        side=side,
        deep=deep,
        layers=layers,
        deep_lengths_B=deep_lengths_B,
    )


def _check_prefixes(prompts: Sequence[Prompt], *, has_prefix: bool, deep: Tensor | None) -> None:
    """Raise unless prompts have latent places where there are prefixes, and nowhere else."""
    if any((p.latent_at is None) == has_prefix for p in prompts):
        raise ConfigError(
            "prefixes and prompts do not match: a prompt built with `latent=` needs a prefix, "
            "a text prompt takes none"
        )
    if deep is not None and deep.shape[2] not in (1, len(prompts)):
        raise ConfigError(f"a deep prefix for {deep.shape[2]} prompts, but {len(prompts)} prompts")


def _scored(prompt: Prompt, columns: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Per target token: the column that predicts it, its id, and its index within its answer."""
    step = 0
    for i, is_target in enumerate(prompt.is_target):
        if is_target:
            yield columns[i] - 1, prompt.ids[i], step
        step = step + 1 if is_target else 0


def _columns(rows: Sequence[tuple[int, ...]], *, count: int, device: torch.device) -> Tensor:
    """Rows of `count` integers each as a tensor, which may be empty."""
    return torch.tensor(rows, dtype=torch.long, device=device).view(-1, count)
