"""An encoder on raw bytes, without pretrained weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from latentwire_fast.config.base import require
from latentwire_fast.config.schema import EncoderConfig, PoolerConfig, RunConfig
from latentwire_fast.models.encoders.base import Encoder, Limit, Texts, rms_normalize
from latentwire_fast.models.layers import pre_norm_layer
from latentwire_fast.models.poolers.base import Pooler
from latentwire_fast.models.poolers.gated_queries import SlotGates
from latentwire_fast.models.token_states import OneLayer, StatesFacts
from latentwire_fast.prompts.builder import encoded_text
from latentwire_fast.registry import POOLERS


class ByteEncoder(Encoder):
    """UTF-8 bytes, two strided convolutions, a transformer, and a pooler.

    Its own pooler are queries that read the byte states; a gated residual adds their mean, so that
    a fresh pooler starts from a summary of the text.
    """

    @dataclass(frozen=True)
    class Config(EncoderConfig):
        """An encoder on UTF-8 bytes, which starts from nothing.

        Attributes:
            width, layers, heads: of its transformer.
            max_bytes: longest text that is read.
            gate: of the mean in its own pooler: one number for all slots and texts (`shared`), or
                one per slot, which depends on what the slot read (`slots`).
            pooler: in the place of its own; None for that.
        """

        width: int = 128
        layers: int = 2
        heads: int = 4
        max_bytes: int = 2048
        gate: Literal["shared", "slots"] = "shared"
        pooler: PoolerConfig | None = None

        def __post_init__(self) -> None:
            super().__post_init__()
            self.at_least_one("width", "layers", "heads", "max_bytes")
            require(
                self.width % self.heads == 0,
                f"width={self.width} does not divide among heads={self.heads}",
            )
            if self.pooler is not None:
                self.pooler.check_states_alone(self)
                require(
                    self.gate == "shared",
                    f"gate={self.gate!r} is of the encoder's own pooler, and there is another, "
                    f"{self.pooler.kind!r}; leave one of them out",
                )

        def check(self, run: RunConfig) -> None:
            """Its pooler checks itself."""
            if self.pooler is not None:
                self.pooler.check(run)

    PAD: ClassVar[int] = 256
    table_parameters: ClassVar[tuple[str, ...]] = ("position", "queries")
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        width, heads = config.width, config.heads
        self.embed = nn.Embedding(257, width, padding_idx=self.PAD)
        self.position = nn.Parameter(torch.randn((config.max_bytes + 3) // 4, width) * 0.02)
        self.convolve = nn.Sequential(
            nn.Conv1d(width, width, 5, padding=2),
            nn.GELU(),
            nn.Conv1d(width, width, 4, stride=2, padding=1),
            nn.GELU(),
            nn.Conv1d(width, width, 4, stride=2, padding=1),
        )
        layer = pre_norm_layer(width, heads)
        self.body = nn.TransformerEncoder(layer, config.layers, enable_nested_tensor=False)
        if config.pooler is None:
            self.queries = nn.Parameter(torch.randn(config.latents, width) * 0.5)
            self.attend = nn.MultiheadAttention(width, heads, batch_first=True)
            if config.gate == "shared":
                self.gate = nn.Parameter(torch.zeros(()))
            else:
                self.gates = SlotGates(config.latents, width)
            self.refine = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        else:
            facts = StatesFacts(config.latents, width, layers=0, source=f"encoder {config.kind!r}")
            self.pooler: Pooler = POOLERS.part_of(config.pooler)(config.pooler, facts)
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, config.d_z)

    @property
    def limit(self) -> Limit:
        """In bytes."""
        return Limit("max_bytes", self.config.max_bytes, "bytes")

    def length_of(self, text: str) -> int:
        """Its UTF-8 bytes."""
        return len(text.encode())

    def forward(self, contexts: Texts, questions: Texts | None = None) -> Tensor:
        """Latents `[B, M, d_z]` fp32. Texts beyond `max_bytes` are cut."""
        asked = [None] * len(contexts) if questions is None else questions
        texts = [encoded_text(c, q) for c, q in zip(contexts, asked, strict=True)]
        device = self.norm.weight.device
        rows = [torch.tensor(list(t.encode()[: self.config.max_bytes])) for t in texts]
        width = -(-max(len(r) for r in rows) // 4) * 4
        ids = pad_sequence(rows, batch_first=True, padding_value=self.PAD)
        ids = nn.functional.pad(ids, (0, width - ids.shape[1]), value=self.PAD).to(device)
        padding = (ids == self.PAD).view(len(texts), -1, 4).all(-1)
        states = self._convolve(self.embed(ids), padding)
        states = self.body(states + self.position[: states.shape[1]], src_key_padding_mask=padding)
        if self.config.pooler is None:
            pooled = self._pool(states, padding)
        else:
            pooled = self.pooler(OneLayer(states, ~padding))
        return rms_normalize(self.project(self.norm(pooled)).float())

    def _pool(self, states_BTD: Tensor, padding_BT: Tensor) -> Tensor:
        """States `[B, M, D]` of its own pooler."""
        queries = self.queries.expand(len(states_BTD), -1, -1)
        read, _ = self.attend(
            queries, states_BTD, states_BTD, key_padding_mask=padding_BT, need_weights=False
        )
        real = (~padding_BT).unsqueeze(-1).to(states_BTD)
        mean = (states_BTD * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)
        shared = self.config.gate == "shared"
        gate = torch.sigmoid(self.gate) if shared else self.gates(read)
        pooled: Tensor = self.refine(queries + read + gate * mean)
        return pooled

    def _convolve(self, bytes_BND: Tensor, padding_BT: Tensor) -> Tensor:
        """States `[B, T, D]`, one per four bytes.

        What a filter makes of padding is set to zero, which is what a text on its own has beyond
        its border: its latent does not depend on its batch.
        """
        real_B1T = (~padding_BT).unsqueeze(1).to(bytes_BND)
        states_BDN = bytes_BND.transpose(1, 2)
        for layer in self.convolve:
            states_BDN = layer(states_BDN)
            states_BDN = states_BDN * real_B1T.repeat_interleave(
                states_BDN.shape[-1] // padding_BT.shape[1], -1
            )
        return states_BDN.transpose(1, 2)
