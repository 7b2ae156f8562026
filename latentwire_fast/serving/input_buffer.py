"""The input of a prefill: prompts laid out as arrays, and one block of bytes that holds them all.

Shapes: B rows, T columns, R payloads, M soft tokens of each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from latentwire_fast.errors import ConfigError
from latentwire_fast.prompts.builder import Prompt

# Fields of an input buffer start at multiples of this, so that kernels read whole vectors.
_ALIGNMENT = 16


@dataclass(frozen=True)
class Layout:
    """Prompts padded on the right: causal attention then needs no mask.

    Attributes:
        ids_BT: token ids; the pad id where a soft token will stand, and behind the prompt.
        slots_BT: number of the soft token that stands there; -1 where a token id does.
        lengths_B: real positions of each row.
        soft_B: how many of them soft tokens take.
    """

    ids_BT: np.ndarray
    slots_BT: np.ndarray
    lengths_B: np.ndarray
    soft_B: np.ndarray

    @property
    def width(self) -> int:
        """T."""
        return self.ids_BT.shape[1]

    def with_rows(self, rows: int) -> Layout:
        """With so many rows: the last one again in those that are added."""
        added = (0, rows - len(self.ids_BT))
        ids_BT, slots_BT = (
            np.pad(part, (added, (0, 0)), mode="edge") for part in (self.ids_BT, self.slots_BT)
        )
        lengths_B, soft_B = (
            np.pad(part, added, mode="edge") for part in (self.lengths_B, self.soft_B)
        )
        return Layout(ids_BT, slots_BT, lengths_B, soft_B)


def lay_out(
    prompts: Sequence[Prompt],
    *,
    soft_tokens: int | Sequence[int] | None,
    pad_id: int,
    width_of: Callable[[int], int] | None = None,
    most: int | None = None,
) -> Layout:
    """Lay prompts out for a prefill.

    `prompts.batch.collate` does this for training too, id by id, which takes longer than the
    prefill of a long prompt on a GPU; prompts of one latent are three slices.

    Args:
        soft_tokens: M for prompts with a latent, of all or of each; None for text prompts.
        width_of: makes T, at least as large, of the longest prompt's positions; none: T is these.
        most: T is not above this, unless a prompt is longer.

    Raises:
        ConfigError: no prompts, an empty one, one whose latent is outside it, or one with a latent
            where none is given, or the other way round.
    """
    if not prompts:
        raise ConfigError("no prompts to read; give at least one")
    for i, prompt in enumerate(prompts):
        _check(prompt, i, is_text=soft_tokens is None)
    soft_B = np.broadcast_to(np.array(soft_tokens or 0, np.int64), len(prompts))
    lengths = np.array([len(prompt.ids) for prompt in prompts]) + soft_B
    if not lengths.all():
        raise ConfigError(f"prompt {int(lengths.argmin())} is empty; it needs at least one token")
    longest = int(lengths.max())
    width = longest if width_of is None else width_of(longest)
    if most is not None:
        width = max(longest, min(width, most))
    ids_BT = np.full((len(prompts), width), pad_id, np.int64)
    slots_BT = np.full_like(ids_BT, -1)
    for ids_T, slots_T, prompt, soft in zip(ids_BT, slots_BT, prompts, soft_B, strict=True):
        start, ids = prompt.latent_at or 0, prompt.ids
        ids_T[:start] = ids[:start]
        ids_T[start + soft : len(ids) + soft] = ids[start:]
        slots_T[start : start + soft] = range(soft)
    return Layout(ids_BT, slots_BT, lengths, soft_B)


def _check(prompt: Prompt, number: int, *, is_text: bool) -> None:
    at = prompt.latent_at
    if is_text and at is not None:
        raise ConfigError(
            f"prompt {number} was built with `latent=`, but nothing is given to stand there; give "
            "its payload, or build it as text"
        )
    if not is_text and at is None:
        raise ConfigError(
            f"prompt {number} was built as text, and has no place for a latent; build it with "
            "`latent=`"
        )
    if at is not None and not 0 <= at <= len(prompt.ids):
        raise ConfigError(
            f"prompt {number} has its latent at {at} of {len(prompt.ids)} tokens; build it with "
            "`latent=`"
        )


Fields = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


class InputBuffer:
    """Named tensors in one block of bytes, which crosses to the device in one copy.

    Args:
        fields: dtype and shape by name.
        device: where `tensors` live. On the CPU they are what `fill` writes to; otherwise the
            block also exists in pinned host memory.
    """

    def __init__(self, fields: Fields, *, device: torch.device) -> None:
        offsets, end = [], 0
        for dtype, shape in fields.values():
            offsets.append(end)
            end += -(-dtype.itemsize * math.prod(shape) // _ALIGNMENT) * _ALIGNMENT
        on_gpu = device.type == "cuda"
        self._host = torch.empty(end, dtype=torch.uint8, pin_memory=on_gpu)
        self._block = torch.empty_like(self._host, device=device) if on_gpu else self._host
        self._sent = torch.cuda.Event() if on_gpu else None

        def views(block: Tensor) -> dict[str, Tensor]:
            return {
                name: block[start : start + dtype.itemsize * math.prod(shape)]
                .view(dtype)
                .view(shape)
                for start, (name, (dtype, shape)) in zip(offsets, fields.items(), strict=True)
            }

        self._arrays = {name: view.numpy() for name, view in views(self._host).items()}
        self.tensors = views(self._block)

    def fill(self, values: Mapping[str, np.ndarray]) -> None:
        """Write all fields and send them off, on the current stream."""
        if self._sent is not None:
            self._sent.synchronize()  # the last copy may still be reading
        for name, array in self._arrays.items():
            np.copyto(array, values[name])
        if self._sent is not None:
            self._block.copy_(self._host, non_blocking=True)
            self._sent.record()
