"""Latent `[B, M, d_z]` to cross-attention between the layers of one reader.

Behind some of the reader's layers, every position attends to the M latents, and what it reads there
is added to its hidden state through a learned gate that starts at zero (Flamingo, arXiv:2204.14198;
the seeds' multi-depth adapters, behind layers 5, 10 and 15). The latent takes none of the reader's
positions, and can be read at several depths; each forward pass reads it again, for each new token.

Shapes: B rows, T positions, D the reader's width, M latents, d the latent's width, W width of the
attention, h its heads, w = W / h.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentwire_fast.config.base import require
from latentwire_fast.config.schema import AttachmentConfig, Mode
from latentwire_fast.errors import ConfigError
from latentwire_fast.models.attachments.base import Attachment
from latentwire_fast.prompts.batch import LayerUpdates
from latentwire_fast.prompts.builder import Turn
from latentwire_fast.readers.card import ReaderCard
from latentwire_fast.readers.layer_updates import hidden_sizes
from latentwire_fast.readers.reader import Reader


class CrossAttention(Attachment):
    """The latents, lifted to width W and told apart by a learned vector each, and a `Block` behind
    each of the chosen layers that reads them. All M of one latent for each prompt: several payloads
    in one prompt, and latents with fewer vectors, are refused.

    Args:
        latents: M. d_z: width of the latent. d_model: D.
        layers: numbers of the reader's layers, from 0, behind which it is read.
    """

    @dataclass(frozen=True)
    class Config(AttachmentConfig):
        """Hidden states that attend to the latents, behind some of the reader's layers.

        Attributes:
            layers: the numbers of these, from 0; none for `count` layers, evenly spread.
            count: how many, where they are not named; a small reader may have fewer.
            width, heads: of the attention.
            expansion: inner width of the MLP behind it, as a multiple of its width.
            dropout: on what is read.
        """

        layers: tuple[int, ...] = ()
        count: int = 3
        width: int = 128
        heads: int = 4
        expansion: int = 4
        dropout: float = 0.0

        def __post_init__(self) -> None:
            super().__post_init__()
            self.at_least_one("count", "width", "heads", "expansion")
            require(0 <= self.dropout < 1, f"dropout={self.dropout}, expected in [0, 1)")
            require(
                self.width % self.heads == 0,
                f"width={self.width} does not divide among heads={self.heads}",
            )
            require(
                min(self.layers, default=0) >= 0 and len({*self.layers}) == len(self.layers),
                f"attachment {self.kind!r}: layers={self.layers}, expected different numbers from "
                "0 on",
            )

        def layers_of(self, card: ReaderCard) -> tuple[int, ...]:
            """The numbers of the layers of one reader, in ascending order.

            Raises:
                ConfigError: it has no such layer.
            """
            if not self.layers:
                parts = range(1, self.count + 1)
                spread = (part * card.layers // (self.count + 1) - 1 for part in parts)
                return tuple(sorted({max(0, number) for number in spread}))
            if max(self.layers) >= card.layers:
                raise ConfigError(
                    f"attachment {self.kind!r}: layers={self.layers}, and reader {card.source!r} "
                    f"has {card.layers} of them, numbered from 0; leave `layers` out to have "
                    "`count` of each reader's"
                )
            return tuple(sorted(self.layers))

    gives = "layers"
    config: Config
    table_parameters: ClassVar[tuple[str, ...]] = ("slots",)

    def __init__(
        self, config: Config, *, latents: int, d_z: int, d_model: int, layers: Sequence[int]
    ) -> None:
        super().__init__(config)
        self.latents = latents
        self.lift = nn.Linear(d_z, config.width)
        self.slots = nn.Parameter(torch.randn(latents, config.width) * 0.5)
        self.norm = nn.LayerNorm(config.width)
        self.blocks = nn.ModuleDict({str(number): Block(config, d_model) for number in layers})

    @classmethod
    def build(
        cls, config: AttachmentConfig, card: ReaderCard, *, latents: int, d_z: int
    ) -> CrossAttention:
        """Cross-attention for the reader of a card."""
        assert isinstance(config, CrossAttention.Config)
        layers = config.layers_of(card)
        return cls(config, latents=latents, d_z=d_z, d_model=card.d_model, layers=layers)

    @property
    def positions(self) -> int:
        """None of the reader's."""
        return 0

    def compared_positions_of(self, latents: int) -> int:
        """One per latent: as many are attended to beside the reader's own."""
        return min(latents, self.latents)

    @property
    def _numbered(self) -> list[tuple[int, Block]]:
        return [(int(number), cast(Block, block)) for number, block in self.blocks.items()]

    @torch.no_grad()
    def start(self, reader: Reader, *, mode: Mode, contexts: Sequence[str]) -> None:
        """Give what is read the size of the reader's hidden states, layer by layer: in some readers
        those grow by a factor of a hundred over the layers."""
        prompt = reader.prompts.build([Turn("")], context="")
        sizes = hidden_sizes(reader.model, torch.tensor([prompt.ids], device=reader.device))
        for number, block in self._numbered:
            block.out.weight.mul_(sizes[number])

    def forward(self, latent_BMd: Tensor, *, gain: float = 1.0) -> LayerUpdates:
        """The update of the hidden states behind each of the layers.

        Args:
            gain: multiplies what is added to them.
        """
        memory_BMW = self.norm(self.lift(latent_BMd) + self.slots)
        return {n: Update(block, *block.remember(memory_BMW), gain) for n, block in self._numbered}

    @torch.no_grad()
    def rms(self, latent_BMd: Tensor) -> dict[str, float]:
        """How far the gates are open: the mean of `|tanh(gate)|` over the layers."""
        gates = torch.stack([block.gate for _, block in self._numbered])
        return {"layer_gate": gates.tanh().abs().mean().item()}


class Block(nn.Module):
    """Cross-attention to the latents, an MLP on what was read, and the way back, times
    `tanh(gate)`.

    Args:
        d_model: D.
    """

    def __init__(self, config: CrossAttention.Config, d_model: int) -> None:
        super().__init__()
        width = config.width
        self.heads, self.dropout = config.heads, config.dropout
        self.norm = nn.LayerNorm(d_model)
        self.query = nn.Linear(d_model, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.inner_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, config.expansion * width)
        self.down = nn.Linear(config.expansion * width, width)
        self.out = nn.Linear(width, d_model, bias=False)
        nn.init.normal_(self.out.weight, std=width**-0.5)
        self.gate = nn.Parameter(torch.zeros(()))

    def remember(self, memory_BMW: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, h, M, w]` of the latents."""
        key_BMW, value_BMW = self.key_value(memory_BMW).chunk(2, -1)
        return self._split(key_BMW), self._split(value_BMW)

    def forward(self, hidden_BTD: Tensor, key_BhMw: Tensor, value_BhMw: Tensor) -> Tensor:
        """What is added to hidden states `[B, T, D]`, in the weights' dtype."""
        query_BhTw = self._split(self.query(self.norm(hidden_BTD)))
        dropout = self.dropout if self.training else 0.0
        read_BhTw = F.scaled_dot_product_attention(
            query_BhTw, key_BhMw, value_BhMw, dropout_p=dropout
        )
        read_BTW = read_BhTw.transpose(1, 2).flatten(2)
        read_BTW = read_BTW + self.down(F.gelu(self.up(self.inner_norm(read_BTW))))
        made_BTD: Tensor = self.gate.tanh() * self.out(read_BTW)
        return made_BTD

    def _split(self, rows_BTW: Tensor) -> Tensor:
        return rows_BTW.unflatten(-1, (self.heads, -1)).transpose(1, 2)


@dataclass(frozen=True)
class Update:
    """Hidden states behind one layer, with what they read of some latents added.

    Attributes:
        key_BhMw, value_BhMw: of one latent for each row, or of one for all rows.
        gain: on what is added.
    """

    block: Block
    key_BhMw: Tensor
    value_BhMw: Tensor
    gain: float

    def __call__(self, hidden_BTD: Tensor) -> Tensor:
        rows = len(hidden_BTD)
        if len(self.key_BhMw) not in (1, rows):
            raise ConfigError(f"latents for {len(self.key_BhMw)} prompts, but {rows} prompts")
        # On the device and in the dtype of the attention, which need not be the layer's.
        own_BTD = hidden_BTD.to(self.key_BhMw)
        keys, values = (x.expand(rows, -1, -1, -1) for x in (self.key_BhMw, self.value_BhMw))
        made_BTD = self.gain * self.block(own_BTD, keys, values)
        return hidden_BTD + made_BTD.to(hidden_BTD)
