"""The captured passes that a receiver keeps: in a bounded amount of memory."""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

import torch

from latentwire_fast.serving.batch import Shape

logger = logging.getLogger(__name__)


class Kept(Protocol):
    """A captured pass, as far as it is kept."""

    @property
    def bytes(self) -> int:
        """Device memory that is freed with it."""
        ...


P = TypeVar("P", bound=Kept)


class PassCache(Generic[P]):
    """The captured passes of one receiver: the last used ones that fit into so many bytes, and
    always the newest.

    A pass that is dropped stays in memory for as long as a result of it is in use.
    """

    def __init__(self, limit: float) -> None:
        self.captures = 0
        self._limit = limit
        self._passes: OrderedDict[Shape, P] = OrderedDict()

    def get(self, shape: Shape, capture: Callable[[], P]) -> P:
        """The pass for a shape, captured now if it is not there."""
        found = self._passes.pop(shape, None)
        if found is None:
            found = self._captured(capture)
        self._passes[shape] = found
        while len(self._passes) > 1 and self.bytes > self._limit:
            dropped, _ = self._passes.popitem(last=False)
            logger.info("dropped the graph for %s to make room for %s", dropped, shape)
        return found

    def _captured(self, capture: Callable[[], P]) -> P:
        try:
            found = capture()
        except torch.OutOfMemoryError:
            if not self._passes:
                raise
            logger.info("no memory for one more graph: dropped all %d", len(self._passes))
            self._passes.clear()
            found = capture()
        self.captures += 1
        return found

    @property
    def bytes(self) -> int:
        """Of all of them."""
        return sum(kept.bytes for kept in self._passes.values())

    @property
    def shapes(self) -> Sequence[Shape]:
        """The captured shapes, least recently used first."""
        return list(self._passes)


def memory_for_graphs(device: torch.device) -> float:
    """A quarter of what is free now, in bytes; on a CPU, which has no graphs, no limit."""
    return torch.cuda.mem_get_info(device)[0] / 4 if device.type == "cuda" else math.inf
