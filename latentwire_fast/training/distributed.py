"""Sums over processes. Only these communicate, and only between steps: a process may retry its part
of a step after running out of memory without the others knowing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

Key = TypeVar("Key", bound=Hashable)
T = TypeVar("T")


class Reducer:
    """All-reduces of one training step; with one process they cost nothing."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.alone = accelerator.num_processes == 1

    def _sum(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values, reduction="sum")

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        if self.alone:
            return flag
        return bool(self._sum(torch.tensor(int(flag), device=self.accelerator.device)).item())

    def each(self, value: T) -> list[T]:
        """Every process's value, in the order of the processes."""
        return [value] if self.alone else list(gather_object([value]))

    def counts(self, counts: Counter[Key]) -> Counter[Key]:
        """Counts of the global batch. Every process must have the same keys."""
        if self.alone:
            return counts
        keys = sorted(counts, key=repr)
        total = self._sum(torch.tensor([counts[k] for k in keys], device=self.accelerator.device))
        return Counter(dict(zip(keys, total.tolist(), strict=True)))

    def gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum the gradients in place, in one flat all-reduce: the trained parts are small."""
        if self.alone:
            return
        # The same parameters on every process, as they depend on the step. The others keep no
        # gradient: with one of zeros an optimiser would move them on by their momentum.
        grads = [p.grad for p in parameters if p.grad is not None]
        if not grads:
            return
        flat = self._sum(torch.cat([g.flatten() for g in grads]))
        for grad, total in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(total.view_as(grad))

    def values(self, loss: Tensor, parts: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Sums of a loss and its named parts, each already a share of the global batch."""
        if self.alone:
            return loss, dict(parts)
        keys = sorted(parts)
        flat = self._sum(torch.stack([loss, *(parts[k].float() for k in keys)]))
        return flat[0], dict(zip(keys, flat[1:], strict=True))
