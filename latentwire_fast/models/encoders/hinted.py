"""Another encoder's latents, and one more that tells the reader about how long the answer is.

What is told travels as every other latent does: it is quantised, coded and counted with the rest of
the payload. Who sends a payload may know the answer's length (in training it is known). Who does
not sends "not known", which a share of the training's texts get too.

Shapes: B texts, M latents with the one of the hint, d their width.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentwire_fast.config.base import require
from latentwire_fast.config.latents import has_curriculum
from latentwire_fast.config.schema import EncoderConfig, PoolerConfig, RunConfig
from latentwire_fast.models.encoders.base import Encoder, Limit, Texts
from latentwire_fast.readers.reader import Reader
from latentwire_fast.registry import ENCODERS


class HintedEncoder(Encoder):
    """M - 1 latents of another encoder, then the hint: one of a few ranges of the answer's length,
    or that it is not known.

    Each of these is a vector with a single value that is not zero, so that every bottleneck of
    numbers keeps them apart.

    Args:
        text: the other encoder.
    """

    @dataclass(frozen=True)
    class Config(EncoderConfig):
        """An encoder with a hint about the answer behind its latents.

        Attributes:
            text: the other encoder. Its `latents` are one fewer than those of this one, and its
                `d_z` is the same, whatever is given there.
            edges: the longest answer of each range but the last, in the other encoder's unit.
            drop: share of the training's texts whose hint says that the length is not known.
        """

        text: EncoderConfig = field(default_factory=lambda: ENCODERS.config("lm"))
        edges: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
        drop: float = 0.5

        def __post_init__(self) -> None:
            super().__post_init__()
            require(
                self.latents > 1,
                f"latents={self.latents}: one is the hint; give at least 2",
            )
            require(
                bool(self.edges)
                and self.edges[0] >= 0
                and all(a < b for a, b in pairwise(self.edges)),
                f"edges={list(self.edges)}, expected whole numbers from 0 on, each above the last",
            )
            require(
                self.d_z >= len(self.edges) + 2,
                f"d_z={self.d_z}: {len(self.edges)} edges make {len(self.edges) + 2} hints with "
                "'not known', each with a value of its own; give fewer edges, or a larger d_z",
            )
            require(0 <= self.drop <= 1, f"drop={self.drop}, expected 0 to 1")
            require(
                not (self.text.varies or self.text.selects_positions or self.text.hints),
                f"encoder {self.kind!r} takes another one with latents that do not vary, stand at "
                "no positions of the text, and have no hint yet; change its `text`",
            )
            text = replace(self.text, latents=self.latents - 1, d_z=self.d_z)
            object.__setattr__(self, "text", text)

        @property
        def hints(self) -> bool:
            """Its last latent does."""
            return True

        @property
        def source(self) -> str | None:
            """The other encoder's."""
            return self.text.source

        @property
        def pooler(self) -> PoolerConfig | None:
            """The other encoder's, where it has one."""
            found: PoolerConfig | None = getattr(self.text, "pooler", None)
            return found

        @property
        def texts_to_fit(self) -> int:
            """As many as the other encoder wants."""
            return self.text.texts_to_fit

        def with_source(self, source: str) -> EncoderConfig:
            """With another encoder that starts from another LM."""
            return replace(self, text=self.text.with_source(source))

        def map_sources(self, change: Any) -> EncoderConfig:
            """As the other encoder's."""
            return replace(self, text=self.text.map_sources(change))

        def allows(self, trained: EncoderConfig) -> bool:
            """Whether it differs at most in what the other encoder allows."""
            if not isinstance(trained, HintedEncoder.Config) or not self.text.allows(trained.text):
                return False
            return trained == replace(self, text=trained.text)

        def check(self, run: RunConfig) -> None:
            """Raise unless the last latent is a hint for all readers and stages, once per text."""
            self.text.check(run)
            others = {
                "private_slots": run.private_slots,
                "stages with fewer latents": has_curriculum(run.stages, self.latents),
                "data.chunk_length": run.data.chunk_length,
                "evaluation.chunk_length": run.evaluation.chunk_length,
            }
            found = [name for name, value in others.items() if value]
            require(
                not found,
                f"encoder {self.kind!r}: the last latent is a hint for all readers, once per text; "
                f"leave out {' and '.join(found)}",
            )

    config: Config
    hints_Kd: Tensor

    def __init__(self, config: Config, text: Encoder) -> None:
        super().__init__(config)
        self.text = text
        # RMS 1, as the other latents
        hints_Kd = torch.eye(len(config.edges) + 2, config.d_z) * config.d_z**0.5
        self.register_buffer("hints_Kd", hints_Kd, persistent=False)

    @classmethod
    def build(cls, config: EncoderConfig, readers: Mapping[str, Reader]) -> HintedEncoder:
        """Around a fresh one of the other encoder, whose settings may ask for less than given."""
        assert isinstance(config, HintedEncoder.Config)
        text = ENCODERS.part_of(config.text).build(config.text, readers)
        return cls(replace(config, text=text.config), text)

    @classmethod
    def outline(cls, config: EncoderConfig) -> HintedEncoder:
        """Around the other encoder's outline."""
        assert isinstance(config, HintedEncoder.Config)
        text = ENCODERS.part_of(config.text).outline(config.text)
        with torch.device("meta"):
            return cls(config, text)

    @property
    def core(self) -> nn.Module | None:
        """The other encoder's LM, where it has one."""
        return getattr(self.text, "core", None)

    def forward(self, contexts: Texts, questions: Texts | None = None) -> Tensor:
        """Latents `[B, M, d_z]` fp32 whose hint is that the length is not known."""
        latent_BNd = self.text(contexts, questions)
        return torch.cat([latent_BNd, self.hints_Kd[:1].expand(len(latent_BNd), 1, -1)], 1)

    def with_hints(
        self, latent_BMd: Tensor, lengths: Sequence[Sequence[int]], *, drop: bool = False
    ) -> Tensor:
        """Latents that tell the range of their answers' lengths, where it is the same for all."""
        told = torch.tensor([self._hint(of_text) for of_text in lengths])
        if drop:
            told = told.masked_fill(torch.rand(len(told)) < self.config.drop, 0)
        hint_B1d = self.hints_Kd[told.to(self.hints_Kd.device)][:, None]
        return torch.cat([latent_BMd[:, :-1], hint_B1d], 1)

    def _hint(self, lengths: Sequence[int]) -> int:
        """The row of `hints_Kd`: 0 is "not known"."""
        ranges = {bisect_left(self.config.edges, length) for length in lengths}
        return 1 + ranges.pop() if len(ranges) == 1 else 0

    def fit(self, contexts: Texts, questions: Texts | None = None) -> None:
        """As the other encoder."""
        self.text.fit(contexts, questions)

    def facts(self) -> dict[str, Any]:
        """Those of the other encoder."""
        return self.text.facts()

    @property
    def limit(self) -> Limit:
        """That of the other encoder."""
        return self.text.limit

    def length_of(self, text: str) -> int:
        """In the other encoder's unit."""
        return self.text.length_of(text)

    def keep_states(self, folder: Path, *, rank: int) -> None:
        """As the other encoder."""
        self.text.keep_states(folder, rank=rank)

    def kept_bytes(self, context: str) -> int:
        """As the other encoder."""
        return self.text.kept_bytes(context)

    def save(self, folder: Path) -> list[str]:
        """Write what the other encoder needs."""
        return self.text.save(folder)

    @classmethod
    def load(cls, folder: Path, config: EncoderConfig) -> HintedEncoder:
        """Around the other encoder that was saved there."""
        assert isinstance(config, HintedEncoder.Config)
        return cls(config, ENCODERS.part_of(config.text).load(folder, config.text))
