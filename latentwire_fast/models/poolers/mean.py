"""A text as one vector, given to every latent: a control that shows what a single vector loses.

Seeds and papers that pool a whole text to one vector see their latents become alike (pairwise
cosine 0.999) and the answers with them. Compare a run's effective rank with that of this pooler.

Shapes: B texts, T positions, M latents, D the encoder's width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentwire_fast.config.schema import PoolerConfig
from latentwire_fast.models.poolers.base import Pooler
from latentwire_fast.models.poolers.spans import span_weights
from latentwire_fast.models.token_states import StatesFacts, TokenStates


class SlotQueries(nn.Module):
    """One vector `[B, D]` to M states `[B, M, D]`: state m is the vector times a learned vector,
    plus another. So each slot may look at other channels of it."""

    table_parameters: ClassVar[tuple[str, ...]] = ("scales", "slots")

    def __init__(self, latents: int, width: int) -> None:
        super().__init__()
        self.scales = nn.Parameter(torch.randn(latents, width))
        self.slots = nn.Parameter(torch.randn(latents, width) * 0.02)

    def forward(self, vector_BD: Tensor) -> Tensor:
        """States `[B, M, D]`."""
        return vector_BD[:, None] * self.scales + self.slots


class MeanPooler(Pooler):
    """The mean of the text's last hidden states, spread over the M latents by learned queries."""

    @dataclass(frozen=True)
    class Config(PoolerConfig):
        """One vector per text, a control; there is nothing to set."""

    varies = True

    def __init__(self, config: Config, lm: StatesFacts) -> None:
        super().__init__(config, lm)
        self.queries = SlotQueries(lm.latents, lm.width)

    @property
    def states(self) -> int:
        """The last layer's."""
        return 1

    def forward(self, text: TokenStates) -> Tensor:
        """States `[B, M, D]`."""
        states_BMD: Tensor = self.queries(mean_vector(text))
        return states_BMD


def mean_vector(text: TokenStates) -> Tensor:
    """The mean `[B, D]` of each text's last hidden states, normalised to variance 1."""
    hidden_BTD, is_text_BT = text.last()
    mean_BD = (span_weights(is_text_BT, 1) @ hidden_BTD.float()).squeeze(1)
    return F.layer_norm(mean_BD, mean_BD.shape[-1:])
