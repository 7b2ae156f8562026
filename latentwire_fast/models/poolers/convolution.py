"""Strided convolutions over a text's hidden states: what stands near each other is put together.

Shapes: B texts, T positions, N positions behind a convolution, M latents, D the encoder's width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentwire_fast.config.base import require
from latentwire_fast.config.schema import PoolerConfig
from latentwire_fast.models.poolers.base import Pooler
from latentwire_fast.models.poolers.spans import span_weights
from latentwire_fast.models.token_states import StatesFacts, TokenStates


class ConvolutionPooler(Pooler):
    """Convolutions that each make the text `stride` times shorter, then means over M spans of what
    is left."""

    @dataclass(frozen=True)
    class Config(PoolerConfig):
        """Strided convolutions.

        Attributes:
            layers: how many there are.
            kernel: positions that each reads.
            stride: how many times shorter it makes the text.
        """

        layers: int = 2
        kernel: int = 4
        stride: int = 2

        def __post_init__(self) -> None:
            super().__post_init__()
            self.at_least_one("layers", "kernel", "stride")
            require(
                self.kernel >= self.stride,
                f"kernel={self.kernel} is less than stride={self.stride}: positions between two "
                "steps would be read by none; make it at least as long",
            )

    config: Config
    varies = True

    def __init__(self, config: Config, lm: StatesFacts) -> None:
        super().__init__(config, lm)
        self.latents = lm.latents
        self.layers = nn.ModuleList(
            nn.Conv1d(lm.width, lm.width, config.kernel, config.stride)
            for _ in range(config.layers)
        )

    @property
    def states(self) -> int:
        """The last layer's."""
        return 1

    def forward(self, text: TokenStates) -> Tensor:
        """States `[B, M, D]`."""
        hidden_BTD, inside_BT = text.last()
        states_BTD = F.layer_norm(hidden_BTD.float(), hidden_BTD.shape[-1:])
        for number, layer in enumerate(self.layers):
            states_BTD = F.gelu(states_BTD) if number else states_BTD
            states_BTD, inside_BT = self._convolve(layer, states_BTD, inside_BT)
        return span_weights(inside_BT, self.latents, counts_B=text.counts_B) @ states_BTD

    def _convolve(
        self, layer: nn.Module, states_BTD: Tensor, inside_BT: Tensor
    ) -> tuple[Tensor, Tensor]:
        """States `[B, N, D]`, N = ceil(T / stride), and the mask of those that saw the text.

        What is not of the text is zero before each convolution, as it is beyond the border of a
        text on its own: a text's states do not depend on its batch.
        """
        kernel, stride, length = self.config.kernel, self.config.stride, inside_BT.shape[1]
        count = -(-length // stride)
        before = (kernel - stride) // 2
        behind = (count - 1) * stride + kernel - before - length
        text_BTD = torch.where(inside_BT[..., None], states_BTD, 0.0)
        padded_BDT = F.pad(text_BTD.transpose(1, 2), (before, behind))
        inside_BNs = F.pad(inside_BT, (0, count * stride - length)).unflatten(1, (count, stride))
        return layer(padded_BDT).transpose(1, 2), inside_BNs.any(-1)
