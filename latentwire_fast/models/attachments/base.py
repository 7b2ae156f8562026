"""The base class of reader attachments, and the reader inputs that they make together.

Shapes: B batch, M latents, d the latent's width, D the reader's; L layers, H key/value heads of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, TypedDict

from torch import Tensor, nn

from latentwire_fast.config.schema import AttachmentConfig, Mode
from latentwire_fast.prompts.batch import LayerUpdates
from latentwire_fast.readers.card import ReaderCard
from latentwire_fast.readers.reader import Reader


class ReaderInputs(TypedDict):
    """A latent as one reader takes it in: keyword arguments of `Reader.collate` and `generate`.

    prefixes: soft tokens `[B, M, D]`, none of them (M = 0) where the prefix is deep only.
    deep: keys and values `[L, 2, B, H, P, d_head]`, or None.
    head: how many of a prompt's first ids the deep prefix holds already.
    layers: updates of the hidden states between the reader's layers, or None.
    """

    prefixes: Tensor
    deep: Tensor | None
    head: int
    layers: LayerUpdates | None


Place = Literal["prefixes", "deep", "layers"]


class Attachment(nn.Module):
    """Latents to one entry of a reader's inputs.

    An attachment of a new kind that gives a reader something else adds an entry to `ReaderInputs`,
    and what reads it to `Reader`.

    Attributes:
        gives: that entry.
        varies: whether it takes latents with fewer than M vectors, and makes a position of each.
        config: its settings.
    """

    Config: ClassVar[type[AttachmentConfig]] = AttachmentConfig
    gives: ClassVar[Place]
    varies: ClassVar[bool] = False

    def __init__(self, config: AttachmentConfig) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def build(
        cls, config: AttachmentConfig, card: ReaderCard, *, latents: int, d_z: int
    ) -> Attachment:
        """A fresh attachment for latents `[latents, d_z]` and the reader of a card."""
        raise NotImplementedError

    @property
    def positions(self) -> int:
        """How many of the reader's positions it takes."""
        raise NotImplementedError

    @property
    def head_positions(self) -> int:
        """How many of these hold the first ids of a prompt (template and label), not the latent."""
        return 0

    def start(self, reader: Reader, *, mode: Mode, contexts: Sequence[str]) -> None:
        """Take from the reader what a fresh attachment begins with.

        Args:
            contexts: a few texts of the training data.
        """

    def forward(self, latent_BMd: Tensor, *, gain: float = 1.0) -> Tensor | LayerUpdates:
        """The entry of the reader's inputs that `gives` names.

        Args:
            gain: a factor on its strength, which a user may give when decoding.
        """
        raise NotImplementedError

    def positions_of(self, latents: int) -> int:
        """How many positions it makes of so many latents, those of a prompt's head aside. Latents
        that are other readers' own may be among them: it makes nothing of these."""
        most = self.positions - self.head_positions
        return min(latents, most) if self.config.varies else most

    def compared_positions_of(self, latents: int) -> int:
        """How many positions of text it is compared with: those that it takes for the latents."""
        return self.positions_of(latents)

    def rms(self, latent_BMd: Tensor) -> dict[str, float]:
        """Root mean squares of what it makes, by name, for the log."""
        return {}

    @property
    def reads_codes(self) -> bool:
        """Whether `of_codes` is there."""
        return False

    def of_codes(self, codes: Tensor, scales: Tensor, **packing: Any) -> Tensor:
        """`forward` of a packed latent, in the weights' dtype; the latent is never written.

        Args:
            codes, scales, packing: as in `ops.dequantize_project_calibrate`.
        """
        raise NotImplementedError


def rms_of(tensor: Tensor) -> float:
    """Root mean square over all elements."""
    return tensor.float().pow(2).mean().sqrt().item()


def rms_ends(tokens_BMD: Tensor) -> dict[str, float]:
    """How far the root mean squares of single tokens lie apart: their 5th and 95th percentiles."""
    rms_N = tokens_BMD.float().pow(2).mean(-1).sqrt().flatten()
    low, high = rms_N.quantile(rms_N.new_tensor([0.05, 0.95])).tolist()
    return {"post_p5": low, "post_p95": high}
