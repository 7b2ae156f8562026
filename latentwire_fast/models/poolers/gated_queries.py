"""Learned queries that each know their place in the row, and weigh what they read.

Shapes: B texts, T positions, M latents, D the encoder's width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentwire_fast.config.schema import PoolerConfig
from latentwire_fast.models.layers import check_heads
from latentwire_fast.models.poolers.base import Pooler
from latentwire_fast.models.token_states import StatesFacts, TokenStates


class SlotGates(nn.Module):
    """Per slot and text, a number in (0, 1): the sigmoid of a linear map of what the slot read, and
    of a bias of its own. A fresh one is about a half everywhere."""

    table_parameters: ClassVar[tuple[str, ...]] = ("bias_M1",)

    def __init__(self, latents: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.map = nn.Linear(width, 1, bias=False)
        nn.init.normal_(self.map.weight, std=0.02)
        self.bias_M1 = nn.Parameter(torch.zeros(latents, 1))

    def forward(self, read_BMD: Tensor) -> Tensor:
        """Gates `[B, M, 1]`."""
        return torch.sigmoid(self.map(self.norm(read_BMD)) + self.bias_M1)


class GatedQueriesPooler(Pooler):
    """M learned queries with sinusoids of their numbers read the text's last hidden states; a gate
    per slot says how much of what was read joins the query.

    The sinusoids keep the queries apart: learned vectors alone were seen to become equal.
    """

    @dataclass(frozen=True)
    class Config(PoolerConfig):
        """Queries with sinusoids and gates.

        Attributes:
            heads: of their attention.
        """

        heads: int = 8

        def __post_init__(self) -> None:
            super().__post_init__()
            self.at_least_one("heads")

    table_parameters: ClassVar[tuple[str, ...]] = ("slots",)
    sinusoids_MD: Tensor

    def __init__(self, config: Config, lm: StatesFacts) -> None:
        super().__init__(config, lm)
        check_heads(config.heads, lm)
        self.slots = nn.Parameter(torch.randn(lm.latents, lm.width) * 0.02)
        self.register_buffer("sinusoids_MD", sinusoids(lm.latents, lm.width), persistent=False)
        self.norm = nn.LayerNorm(lm.width)
        self.attend = nn.MultiheadAttention(lm.width, config.heads, batch_first=True)
        self.gates = SlotGates(lm.latents, lm.width)

    @property
    def states(self) -> int:
        """The last layer's."""
        return 1

    def forward(self, text: TokenStates) -> Tensor:
        """States `[B, M, D]`."""
        hidden_BTD, is_text_BT = text.last()
        memory_BTD = self.norm(F.layer_norm(hidden_BTD.float(), hidden_BTD.shape[-1:]))
        queries_BMD = (self.slots + self.sinusoids_MD).expand(len(text), -1, -1)
        read_BMD, _ = self.attend(
            queries_BMD, memory_BTD, memory_BTD, key_padding_mask=~is_text_BT, need_weights=False
        )
        return queries_BMD + self.gates(read_BMD) * read_BMD


def sinusoids(count: int, width: int) -> Tensor:
    """Sines and cosines `[count, width]` of the numbers 0, 1, ..., with wavelengths from 2 pi to
    20,000 pi (Attention Is All You Need, arXiv:1706.03762, 3.5)."""
    rates = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000.0) / width))
    angles = torch.arange(count)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)[:, :width]
