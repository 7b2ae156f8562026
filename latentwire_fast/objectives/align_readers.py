"""A control: what readers are given is drawn together, which one vector for all texts does best.

Shapes: B texts, P soft tokens, D a reader's width, W the width that all are compared in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from latentwire_fast.config.base import require
from latentwire_fast.config.schema import ObjectiveConfig, RunConfig
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.objectives.base import Objective
from latentwire_fast.objectives.micro_batch import ReaderBatch
from latentwire_fast.objectives.prepared import PreparedItem
from latentwire_fast.readers.reader import Reader


class FixedMap(nn.Module):
    """Vectors `[..., D]` to `[..., W]` by W orthonormal directions, drawn once and not trained: a
    map that learns would go to 0, and teach the soft tokens nothing."""

    map_DW: Tensor

    def __init__(self, d_model: int, width: int) -> None:
        super().__init__()
        self.register_buffer("map_DW", torch.linalg.qr(torch.randn(d_model, width))[0])

    def forward(self, soft_BPD: Tensor) -> Tensor:
        """Of vectors with a root mean square of 1, what comes out has about that too."""
        return soft_BPD @ self.map_DW.to(soft_BPD)


class AlignReaders(Objective):
    """Squared distance of each reader's soft tokens to the mean of all readers', behind fixed maps.

    A control that is known to collapse: soft tokens that are the same for all texts have no
    distance, and what a reader needs is not what another needs. In the experiments that it is from,
    it fell by a factor of 222 while the latents' pairwise cosine rose to 0.999.
    """

    counted = "texts"
    once = True

    @dataclass(frozen=True)
    class Config(ObjectiveConfig):
        """Settings of the alignment.

        Attributes:
            width: that soft tokens are compared in; at most that of the narrowest reader.
        """

        head_fields: ClassVar[tuple[str, ...]] = ("width",)

        width: int = 32

        def __post_init__(self) -> None:
            super().__post_init__()
            self.at_least_one("width")

        def check(self, run: RunConfig) -> None:
            """Raise unless several readers are given soft tokens."""
            require(
                len(run.readers) > 1 and run.gives("prefixes"),
                f"objective {self.kind!r} needs two readers at least, and an attachment 'soft'",
            )

    config: Config

    @classmethod
    def build_head(
        cls, config: ObjectiveConfig, model: Interlingua, readers: Mapping[str, Reader]
    ) -> nn.Module:
        """A map for each reader.

        Raises:
            ConfigError: a reader is narrower than `width`.
        """
        assert isinstance(config, AlignReaders.Config)
        narrowest = min(reader.d_model for reader in readers.values())
        require(
            config.width <= narrowest,
            f"objective {config.kind!r}: width={config.width}, and the narrowest reader has "
            f"{narrowest}; give that at most",
        )
        maps = {name: FixedMap(reader.d_model, config.width) for name, reader in readers.items()}
        return nn.ModuleDict(maps)

    def prepare(self, prepared: PreparedItem, reader: Reader) -> int:
        """Counts texts."""
        return 1

    def compute(self, batch: ReaderBatch) -> Tensor:
        """The mean square of the distances, summed over texts. Compared are the slots that readers
        share, which are each one's first."""
        model, sent_BMd = batch.model, batch.encoded.sent_BMd
        mapped = []
        for name, card in model.cards.items():
            if name == batch.reader.name:
                soft_BPD = batch.inputs["prefixes"]
            else:
                soft_BPD = model.prefix(name, sent_BMd, gain=batch.encoded.gain)
            shared_BPD = soft_BPD[:, : model.slots.shared].float()
            mapped.append(self.reader_head(name)(shared_BPD / card.embedding_rms))
        mapped_RBPW = torch.stack([x_BPW.to(sent_BMd.device) for x_BPW in mapped])
        distances = (mapped_RBPW - mapped_RBPW.mean(0)).square()
        return distances.mean((0, 2, 3)).sum()
