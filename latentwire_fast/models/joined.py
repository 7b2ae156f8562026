"""Several latents in the place of one prompt's text: what a reader is given of them, one behind the
other.

A deep prefix is made for positions that begin at the prompt's start, so the keys of every latent
but the first are turned to where they stand. A prompt with several latents is then the same as one
with a single latent whose prefix is as long as theirs together.

Shapes: R latents, B prompts, M positions of one latent, P positions of a prompt's latents together,
L layers, H key/value heads, D the reader's width or that of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentwire_fast.errors import ConfigError
from latentwire_fast.models.attachments.base import ReaderInputs
from latentwire_fast.readers.reader import Reader
from latentwire_fast.readers.rotary import Turner


@dataclass(frozen=True)
class Pieces:
    """Which latents stand in the place of which prompt's text.

    Attributes:
        per_prompt: the number of latents of each prompt, which follow one another; at least 1.
        slots: of each latent, how many of its vectors there are: the rest of a tensor `[R, M, d]`
            is padding. None: all M.
    """

    per_prompt: tuple[int, ...]
    slots: tuple[int, ...] | None = None

    @classmethod
    def single(cls, prompts: int) -> Pieces:
        """One whole latent for each prompt."""
        return cls((1,) * prompts)

    @property
    def is_single(self) -> bool:
        """Whether each prompt has one latent, whose vectors are all there."""
        return self.slots is None and set(self.per_prompt) == {1}

    @cached_property
    def rows(self) -> list[range]:
        """Per prompt, the numbers of its latents."""
        ends = np.cumsum(self.per_prompt).tolist()
        return [range(end - count, end) for end, count in zip(ends, self.per_prompt, strict=True)]

    def absent_RM(self, latents: int, *, device: torch.device) -> Tensor | None:
        """The vectors that a latent does not have; None where each has all."""
        if self.slots is None:
            return None
        count_R1 = torch.tensor(self.slots, device=device)[:, None]
        return torch.arange(latents, device=device) >= count_R1

    def group(self, payloads: Sequence[bytes]) -> list[tuple[bytes, ...]]:
        """The payloads of each prompt."""
        return [tuple(payloads[r] for r in rows) for rows in self.rows]

    def of(self, prompts: Sequence[int]) -> Pieces:
        """Those of some of the prompts, in this order."""
        slots = None
        if self.slots is not None:
            slots = tuple(self.slots[r] for b in prompts for r in self.rows[b])
        return Pieces(tuple(self.per_prompt[b] for b in prompts), slots)

    def sizes(self, positions: int) -> list[int]:
        """How many positions each prompt's latents take together, `positions` each or as many as
        there are vectors."""
        return [sum(self._size(r, positions) for r in rows) for rows in self.rows]

    def soft_sources(self, positions: int) -> list[np.ndarray]:
        """Per prompt, which of the R x `positions` soft tokens stand in its text's place."""
        return [
            np.array([r * positions + slot for r, slot in self._places(rows, positions)], np.int64)
            for rows in self.rows
        ]

    def deep_sources(self, positions: int, *, head: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Which of the R x (`head` + `positions`) positions of deep prefixes stand in each column
        of the joined ones, and by how much their keys have to be turned; both `[B, P]`, int64.

        A prompt with fewer than P has its padding first: any position, of which nothing is read.

        Args:
            head: how many positions hold the start of the prompt itself: they stand there once.
        """
        width = head + positions
        sources, turns = [], []
        for rows in self.rows:
            places = [*self._places(rows, positions)]
            start = rows[0] * width
            own = [r * width + head + slot for r, slot in places]
            sources.append([*range(start, start + head), *own])
            turns.append([0] * head + [n - slot for n, (_, slot) in enumerate(places)])
        longest = max(map(len, sources))

        def padded(rows: list[list[int]]) -> np.ndarray:
            return np.array([[0] * (longest - len(row)) + row for row in rows], np.int64)

        return padded(sources), padded(turns)

    def _places(self, rows: range, positions: int) -> Iterator[tuple[int, int]]:
        return ((r, slot) for r in rows for slot in range(self._size(r, positions)))

    def _size(self, row: int, positions: int) -> int:
        # Not just the slots: a reader without soft tokens has 0 positions of these.
        return positions if self.slots is None else min(positions, self.slots[row])


def joined_inputs(inputs: ReaderInputs, pieces: Pieces, *, reader: Reader) -> dict[str, Any]:
    """A reader's inputs for prompts, from those for their latents: arguments of `Reader.collate`.

    Raises:
        ConfigError: as `join_deep`; or the reader's layers read the latents.
    """
    if pieces.is_single:
        return {**inputs}
    if inputs["layers"] is not None:
        refuse_layers(pieces, reader)
    joined: dict[str, Any] = {**inputs, "prefixes": join_soft(inputs["prefixes"], pieces)}
    if inputs["deep"] is not None:
        joined["deep"], joined["deep_lengths"] = join_deep_pieces(
            inputs["deep"], pieces, head=inputs["head"], reader=reader
        )
    return joined


def refuse_layers(pieces: Pieces, reader: Reader) -> None:
    """Raise where a reader whose layers read the latents is given more or less than one whole
    latent for each prompt.

    Raises:
        ConfigError: it is.
    """
    if not pieces.is_single:
        raise ConfigError(
            f"reader {reader.name!r} attends to latents between its layers (attachment "
            "'cross_attention'), to those of one whole latent for each prompt; send one payload, "
            "or train another attachment"
        )


def join_soft(soft_RMD: Tensor, pieces: Pieces) -> list[Tensor]:
    """The soft tokens `[P_b, D]` of each prompt."""
    flat_ND = soft_RMD.flatten(0, 1)
    return [
        flat_ND[torch.from_numpy(source).to(flat_ND.device)]
        for source in pieces.soft_sources(soft_RMD.shape[1])
    ]


def join_deep(
    deep_L2RHMD: Tensor, source_BP: Tensor, by_BP: Tensor, *, reader: Reader, turns: bool = True
) -> Tensor:
    """The deep prefixes `[L, 2, B, H, P, D]` of prompts, from those of their latents.

    Args:
        source_BP, by_BP: `Pieces.deep_sources`, on the prefixes' device.
        turns: whether any key has to be turned at all.

    Raises:
        ConfigError: a key has to be turned, and the reader's keys cannot be.
    """
    flat_L2NHD = deep_L2RHMD.transpose(3, 4).flatten(2, 3)
    picked_L2NHD = flat_L2NHD.index_select(2, source_BP.flatten())
    joined = picked_L2NHD.unflatten(2, source_BP.shape).transpose(3, 4)
    if not turns:
        return joined
    turner = _turner(reader)
    last = source_BP.shape[1] - 1
    keys = [
        turner.turn(keys_BHPD, layer=number, by_BT=by_BP, last=last).to(joined.dtype)
        for number, keys_BHPD in enumerate(joined[:, 0])
    ]
    return torch.stack([torch.stack(keys), joined[:, 1]], 1)


def join_deep_pieces(
    deep_L2RHMD: Tensor, pieces: Pieces, *, head: int, reader: Reader
) -> tuple[Tensor, list[int]]:
    """As `join_deep`, and how many of the P positions of each prompt are real: the last ones.

    Raises:
        ConfigError: as `join_deep`.
    """
    positions = deep_L2RHMD.shape[4] - head
    source_BP, by_BP = (
        torch.from_numpy(part).to(deep_L2RHMD.device)
        for part in pieces.deep_sources(positions, head=head)
    )
    turns = max(pieces.per_prompt) > 1
    joined = join_deep(deep_L2RHMD, source_BP, by_BP, reader=reader, turns=turns)
    return joined, [head + size for size in pieces.sizes(positions)]


def _turner(reader: Reader) -> Turner:
    try:
        return reader.turner
    except ConfigError as error:
        raise ConfigError(
            f"reader {reader.name!r} cannot take the deep prefixes of several payloads in one "
            "prompt: its keys at one position cannot be computed from those at another; send one "
            "payload, or train soft tokens alone (attachment 'soft')"
        ) from error
