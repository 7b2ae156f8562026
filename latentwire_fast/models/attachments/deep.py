"""Latent `[B, M, d_z]` to a deep prefix: keys and values for every layer of one reader.

    geometry = reader.kv_geometry
    deep = DeepPrefix(DeepPrefix.Config(), latents=12, d_z=16, geometry=geometry)
    reader.collate(prompts, deep=deep(latent_BMd))

A soft token has to make its way through the reader's first layers; a deep prefix tells each layer
directly what it would have found there (prefix tuning, arXiv:2101.00190, with the prefix generated
from a payload). `readers/kv_cache.py` puts it into a cache.

Shapes: L layers, 2 keys and values, B batch, H key/value heads, M latents, P positions (`length` or
M, and in place those of the prompt's head), D head width, W width of the generator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from latentwire_fast import ops
from latentwire_fast.config.base import require
from latentwire_fast.config.schema import AttachmentConfig, Calibration, Mode
from latentwire_fast.models.attachments.base import Attachment, rms_of
from latentwire_fast.models.layers import SlotReader, pre_norm_layer
from latentwire_fast.readers.card import ReaderCard
from latentwire_fast.readers.kv_geometry import KVGeometry
from latentwire_fast.readers.own_kv import head_keys_values, text_keys_values
from latentwire_fast.readers.reader import Reader

_SPREAD = 0.5  # of what a prefix makes at first, relative to the spread of the texts' own


class DeepPrefix(Attachment):
    """Residual MLP on each latent, a transformer over the slots, then one projection per layer to
    `H x D` keys and values, all in one `ops.project_calibrate` with a group for each.

    Attention over the slots lets one say what several latents hold together, so that the code may
    be spread over them. Loss on the testbed's context mode (one seed, up to 2 facts) after 200 and
    300 steps: 2.0 and 1.0 with both, 2.6 and 1.6 with the MLP alone, 2.7 after 200 with the
    transformer alone.

    The keys are what the cache holds, rotary positions included, so each slot has its own place
    among the reader's positions from 0 on. There is one slot per latent; with a `length`, so many
    learned slots first read the latents by cross-attention.

    Args:
        latents: M, the number of latents (each has a learned bias).
        d_z: width of the latent.
    """

    @dataclass(frozen=True)
    class Config(AttachmentConfig):
        """Keys and values for every layer of the reader's cache.

        Attributes:
            length: how many positions they stand at; None for one per latent.
            width, layers, heads: of the transformer that makes them.
            expansion: inner width of its MLPs, as a multiple of its width.
            dropout: in it.
            in_place: put the prefix where the text stood: behind the reader's own keys and values
                of what comes before the text (template and label), which are kept with it. A
                prefix that holds a text's own keys and values is then that text. Otherwise it
                stands before the whole prompt, and what is before the text is read behind it.
            calibration: rescale the keys, and the values, of each layer by themselves to learned
                gains (which start at the RMS of the reader's own), or only multiply by these.
        """

        length: int | None = None
        width: int = 256
        layers: int = 2
        heads: int = 8
        expansion: int = 4
        dropout: float = 0.0
        in_place: bool = False
        calibration: Calibration = "none"

        @property
        def varies(self) -> bool:
            """Unless it has a length of its own, which goes by nothing."""
            return self.length is None and super().varies

        @property
        def starts_from_texts(self) -> bool:
            """In place, unless it is calibrated to the reader's own sizes."""
            return self.in_place and self.calibration == "none"

        def __post_init__(self) -> None:
            super().__post_init__()
            self.at_least_one("length", "width", "layers", "heads", "expansion")
            require(0 <= self.dropout < 1, f"dropout={self.dropout}, expected in [0, 1)")
            require(
                self.width % self.heads == 0,
                f"width={self.width} does not divide among heads={self.heads}",
            )

    gives = "deep"
    varies = True
    config: Config
    table_parameters: ClassVar[tuple[str, ...]] = ("slots",)

    def __init__(self, config: Config, *, latents: int, d_z: int, geometry: KVGeometry) -> None:
        super().__init__(config)
        self.geometry = geometry
        self.length = config.length or latents
        width = config.width
        self.lift = nn.Linear(d_z, width)
        self.slots = nn.Parameter(torch.randn(latents, width) * 0.5)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, config.expansion * width)
        self.down = nn.Linear(config.expansion * width, width)
        self.dropout = nn.Dropout(config.dropout)
        self.body = nn.TransformerEncoder(
            pre_norm_layer(width, config.heads, expansion=config.expansion, dropout=config.dropout),
            config.layers,
            norm=nn.LayerNorm(width),
            enable_nested_tensor=False,
        )
        self.read: SlotReader | None = None
        if config.length is not None:
            self.read = SlotReader(
                config.length,
                width,
                config.heads,
                expansion=config.expansion,
                dropout=config.dropout,
            )
        # All layers in one matmul; rows are (layer, key or value, head, channel).
        rows = geometry.layers * 2 * geometry.heads * geometry.head_width
        self.project = nn.Linear(width, rows)
        nn.init.normal_(self.project.weight, std=width**-0.5)
        nn.init.zeros_(self.project.bias)
        self.gain = nn.Parameter(torch.tensor(geometry.rms))
        empty = torch.zeros(geometry.layers, 2, 1, geometry.heads, 0, geometry.head_width)
        self.head: Tensor
        self.register_buffer("head", empty, persistent=config.in_place)

    @classmethod
    def build(
        cls, config: AttachmentConfig, card: ReaderCard, *, latents: int, d_z: int
    ) -> DeepPrefix:
        """A deep prefix for the reader of a card."""
        assert isinstance(config, DeepPrefix.Config)
        return cls(config, latents=latents, d_z=d_z, geometry=card.kv)

    @property
    def positions(self) -> int:
        """Those of its length, and those of the prompt's head."""
        return self.length + self.head_positions

    @property
    def head_positions(self) -> int:
        """How many hold the first ids of a prompt."""
        return self.head.shape[4]

    @torch.no_grad()
    def start(self, reader: Reader, *, mode: Mode, contexts: Sequence[str]) -> None:
        """In place: keep the keys and values of a prompt's head, and start from the average key and
        value of the texts in each channel. From the reader's RMS alone, a prefix is noise that
        says more than nothing, and the wrong thing."""
        if not self.config.in_place:
            return
        self.head = head_keys_values(reader, mode).to(self.head)
        if contexts and self.config.starts_from_texts:
            sides = [
                text_keys_values(reader, context, slots=self.length, first=self.head_positions)
                for context in contexts
            ]
            self._start_from(torch.cat(sides, 3).to(self.gain))

    def _start_from(self, sides_L2HPD: Tensor) -> None:
        """Make the average of these the bias, and their spread that of what is made."""
        gain_L2 = sides_L2HPD.square().mean((2, 3, 4)).sqrt()
        mean, std = sides_L2HPD.mean(3), sides_L2HPD.std(3)  # [L, 2, H, D]
        self.gain.copy_(gain_L2)
        self.project.bias.copy_((mean / gain_L2[..., None, None]).flatten())
        self.project.weight.mul_((_SPREAD * std / gain_L2[..., None, None]).flatten()[:, None])

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        if (saved := state.get(f"{prefix}head")) is not None:  # its length is the reader's matter
            self.head = torch.empty_like(saved, device=self.head.device)
        super()._load_from_state_dict(state, prefix, *rest)

    def forward(
        self, latent_BMd: Tensor, *, gain: float = 1.0, absent_BM: Tensor | None = None
    ) -> Tensor:
        """Keys and values `[L, 2, B, H, P, D]`, in the generator's dtype.

        Args:
            gain: multiplies the values (prefix gain); the keys, and so the attention, stay.
            absent_BM: vectors that a latent does not have, the last ones: no other sees them.
        """
        made = self.made(latent_BMd, gain=gain, absent_BM=absent_BM)
        if not self.head_positions:
            return made
        head = self.head.to(made.dtype).expand(-1, -1, len(latent_BMd), -1, -1, -1)
        return torch.cat([head, made], 4)

    def made(self, latent_BMd: Tensor, *, gain: float, absent_BM: Tensor | None = None) -> Tensor:
        """What is made of the latent alone, without the prompt's head."""
        g = self.geometry
        lifted_BMW = self.lift(latent_BMd) + self.slots[: latent_BMd.shape[1]]
        inner = nn.functional.silu(self.up(self.norm(lifted_BMW)))
        hidden = lifted_BMW + self.dropout(self.down(inner))  # [B, M, W]
        if self.read is not None:
            hidden = self.read(hidden)  # [B, length, W]
        # No tensor of Python numbers: a copy from the host, which a graph capture forbids.
        scale_L2 = torch.stack([self.gain[:, 0], gain * self.gain[:, 1]], 1)
        made = ops.project_calibrate(
            self.body(hidden, src_key_padding_mask=absent_BM),
            *(self.project.weight, self.project.bias),
            target_rms=1.0,
            gain=scale_L2.flatten(),
            calibration=self.config.calibration,
            groups=2 * g.layers,
        )
        return made.unflatten(-1, (g.layers, 2, g.heads, g.head_width)).permute(2, 3, 0, 4, 1, 5)

    @torch.no_grad()
    def rms(self, latent_BMd: Tensor) -> dict[str, float]:
        """RMS of keys and of values."""
        keys, values = self(latent_BMd)[..., self.head_positions :, :].unbind(1)
        return {"keys": rms_of(keys), "values": rms_of(values)}
