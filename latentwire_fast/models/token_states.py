"""A batch of texts as the states of their tokens: what every pooler reads, whichever encoder it
stands in.

Shapes: B texts, T positions, D the encoder's width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StatesFacts:
    """Facts of an encoder that a pooler is built for.

    Attributes:
        latents: how many there are, M.
        width: D.
        layers: how many it has; its hidden states are one more, the embeddings.
        source: where it comes from, for messages.
    """

    latents: int
    width: int
    layers: int
    source: str


class TokenStates(ABC):
    """What an encoder makes of each token of a batch of texts.

    Attributes:
        last_layer: the number of its last layer; 0 is the embeddings.
        counts_B: how many latents each text gets, where that differs; None: M.
    """

    last_layer: int
    counts_B: Tensor | None = None

    def absent_BM(self, latents: int) -> Tensor | None:
        """The latents that a text does not get; None where each gets all of them."""
        if self.counts_B is None:
            return None
        return torch.arange(latents, device=self.counts_B.device) >= self.counts_B[:, None]

    @abstractmethod
    def __len__(self) -> int:
        """How many texts there are, B."""

    @abstractmethod
    def layers(self, numbers: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        """Hidden states `[B, T, D]` of these layers, 0 for the embeddings, and a mask `[B, T]` of
        the positions that hold the text itself: in each row one run of at least one position."""

    def all_layers(self) -> tuple[list[Tensor], Tensor]:
        """Those of every layer, embeddings first; as `layers`."""
        return self.layers(range(self.last_layer + 1))

    def last(self) -> tuple[Tensor, Tensor]:
        """Last hidden states `[B, T, D]` and the mask; as `layers`."""
        (states_BTD,), is_text_BT = self.layers([self.last_layer])
        return states_BTD, is_text_BT

    def hidden(self) -> tuple[Tensor, Tensor]:
        """Last hidden states `[B, T, D]` of all that was read, padded on the right, and the real
        length of each `[B]`."""
        states_BTD, is_text_BT = self.last()
        return states_BTD, is_text_BT.sum(1)


class OneLayer(TokenStates):
    """The states of an encoder that has those of one layer to give.

    Args:
        states_BTD: of the texts.
        is_text_BT: where they are of the text itself.
    """

    last_layer = 0

    def __init__(self, states_BTD: Tensor, is_text_BT: Tensor) -> None:
        self._states_BTD = states_BTD
        self._is_text_BT = is_text_BT

    def __len__(self) -> int:
        return len(self._states_BTD)

    def layers(self, numbers: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        """That layer, and the mask."""
        return [self._states_BTD for _ in numbers], self._is_text_BT
