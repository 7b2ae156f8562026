"""Latent `[B, M, d_z]` to changes of a cache that the reader has made itself: a coprocessor of it.

A plain deep prefix makes every key and value anew. Here the reader has read a fixed text where the
latent stands, and differences to the keys and values of that are made of the latent.

A trained module that works on the cache of a frozen model is that of Deliberation in Latent Space
via Differentiable Cache Augmentation (arXiv:2412.17747), which appends to the cache of a prompt.
A receiver has no text to make a cache of, so there is a fixed one, and it is changed, not appended
to: the form of the seeds ("KV deltas blend with deep-prefix caches", log of 2025-10-10).

Shapes: L layers, 2 keys and values, B batch, H key/value heads, P positions, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from latentwire_fast.config.base import require
from latentwire_fast.config.schema import Mode
from latentwire_fast.models.attachments.deep import DeepPrefix
from latentwire_fast.readers.kv_geometry import KVGeometry
from latentwire_fast.readers.own_kv import keys_values_in_place
from latentwire_fast.readers.reader import Reader

TEXT = "Everything that is said about it is known here, and it can be asked for."


class KVCoprocessor(DeepPrefix):
    """`base + tanh(gate) * made`: what a deep prefix makes of the latent, blended into a base.

    The gates, one for the keys and one for the values of each layer, start at zero: at first the
    reader reads the base's text and nothing else. The base is what the reader itself computes of a
    text, as in the paper, and no free parameter: few of the tensors that fit into a cache are one
    that a reader can use (see `DeepPrefix.start`), and the differences begin at one of these. With
    `learned_base` it is trained on from there, as in prefix tuning.

    Args: those of `DeepPrefix`.
    """

    @dataclass(frozen=True)
    class Config(DeepPrefix.Config):
        """Differences to the keys and values of a fixed text, which stand in the text's place.

        Attributes:
            text: what the reader has read there: its first tokens, as many as there are positions.
                A shorter one is repeated.
            learned_base: train the keys and values of that text too.
        """

        in_place: bool = True
        text: str = TEXT
        learned_base: bool = False

        @property
        def starts_from_texts(self) -> bool:
            """No: it starts from its own text."""
            return False

        def __post_init__(self) -> None:
            super().__post_init__()
            require(
                self.in_place,
                f"attachment {self.kind!r}: in_place=False, expected True: its base is a text that "
                "was read there",
            )
            require(bool(self.text.strip()), f"attachment {self.kind!r}: text is empty; give one")

    config: Config
    table_parameters: ClassVar[tuple[str, ...]] = (*DeepPrefix.table_parameters, "gate")

    def __init__(self, config: Config, *, latents: int, d_z: int, geometry: KVGeometry) -> None:
        super().__init__(config, latents=latents, d_z=d_z, geometry=geometry)
        g = geometry
        self.gate = nn.Parameter(torch.zeros(g.layers, 2))
        self.base: Tensor
        base = torch.zeros(g.layers, 2, 1, g.heads, self.length, g.head_width)
        if config.learned_base:
            self.base = nn.Parameter(base)
        else:
            self.register_buffer("base", base)

    @torch.no_grad()
    def start(self, reader: Reader, *, mode: Mode, contexts: Sequence[str]) -> None:
        """Have the reader read a prompt's head and the base's text."""
        read = keys_values_in_place(reader, mode, self.config.text, positions=self.length)
        sizes = [read.shape[4] - self.length, self.length]
        head, base = read.to(self.base).split(sizes, 4)
        self.head = head.clone()
        self.base.copy_(base)

    def made(self, latent_BMd: Tensor, *, gain: float, absent_BM: Tensor | None = None) -> Tensor:
        """The base with what the latent changes, `[L, 2, B, H, P, D]`.

        Args:
            gain: multiplies what the latent adds to the values; the base, and the keys, stay.
        """
        gate = self.gate.tanh()[:, :, None, None, None, None]
        changes = super().made(latent_BMd, gain=gain, absent_BM=absent_BM)
        return self.base[..., : changes.shape[4], :] + gate * changes

    @torch.no_grad()
    def rms(self, latent_BMd: Tensor) -> dict[str, float]:
        """RMS of keys and of values, and how far the gates are open: the mean of `|tanh(gate)|`."""
        return {**super().rms(latent_BMd), "kv_gate": self.gate.tanh().abs().mean().item()}
