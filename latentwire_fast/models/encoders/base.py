"""The base class of encoders.

Every encoder ends in an RMS-normalised latent: the groups of a bottleneck then share one scale of
values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from latentwire_fast.config.schema import EncoderConfig
from latentwire_fast.errors import ConfigError, DataError
from latentwire_fast.models.poolers.base import Selection
from latentwire_fast.prompts.builder import encoded_text
from latentwire_fast.readers.reader import Reader
from latentwire_fast.registry import ENCODERS

Texts = Sequence[str]


class Limit(NamedTuple):
    """The longest text that an encoder reads.

    Attributes:
        setting: the name of the setting that says so.
        length: how many.
        unit: of what.
    """

    setting: str
    length: int
    unit: str


class Encoder(nn.Module):
    """Contexts, or contexts with questions (pure mode), to latents.

    Attributes:
        config: its settings, which may ask for less than the run's did (see `build`).
    """

    Config: ClassVar[type[EncoderConfig]] = EncoderConfig

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def build(cls, config: EncoderConfig, readers: Mapping[str, Reader]) -> Encoder:
        """A fresh encoder, as a training starts from it.

        Args:
            readers: of the run, whose weights it may take.
        """
        return cls(config)

    @classmethod
    def outline(cls, config: EncoderConfig) -> Encoder:
        """An encoder on torch's meta device: the shapes of its weights without the weights.

        Raises:
            ConfigError: its shape is not known here.
        """
        with torch.device("meta"):
            return cls.build(config, {})

    def forward(self, contexts: Texts, questions: Texts | None = None) -> Tensor:
        """Latents `[B, M, d_z]` fp32. Texts beyond the limit are cut."""
        raise NotImplementedError

    def fit(self, contexts: Texts, questions: Texts | None = None) -> None:
        """Take what a fresh encoder begins with from training texts, where its settings ask for
        some (`EncoderConfig.texts_to_fit`)."""

    def facts(self) -> dict[str, Any]:
        """What `metrics.json` says of it beside its settings."""
        return {}

    def select(self, contexts: Texts, questions: Texts | None = None) -> tuple[Tensor, Selection]:
        """Latents and the positions that they stand at: of the text alone, counted from
        its first token, where `text_ends` counts from.

        Raises:
            ConfigError: this encoder selects none.
        """
        raise ConfigError(f"encoder {self.config.kind!r} selects no positions")

    def latent_counts(
        self, contexts: Texts, questions: Texts | None = None
    ) -> tuple[int, ...] | None:
        """How many latents each text gets, the first of M: `forward` gives zeros in the place of
        the others. None where each gets M."""
        return None

    def with_hints(
        self, latent_BMd: Tensor, lengths: Sequence[Sequence[int]], *, drop: bool = False
    ) -> Tensor:
        """Latents that tell how long their answers are.

        Args:
            lengths: per latent, those of the answers that it is to lead to (`length_of`).
            drop: leave out some of them, as a training does.

        Raises:
            ConfigError: this encoder gives no hints.
        """
        raise ConfigError(f"encoder {self.config.kind!r} gives no hints: the encoder 'hinted' does")

    def text_ends(self, context: str, question: str | None = None) -> list[int]:
        """Index of the character behind each token of the text that is read.

        Raises:
            ConfigError: this encoder reads no tokens.
        """
        raise ConfigError(f"encoder {self.config.kind!r} reads no tokens")

    @property
    def limit(self) -> Limit:
        """The longest text that it reads."""
        raise NotImplementedError

    def length_of(self, text: str) -> int:
        """The length of a text (`encoded_text`) in the unit of the limit."""
        raise NotImplementedError

    def check_length(self, context: str, question: str | None = None) -> None:
        """Raise unless the encoder reads all of a text: `forward` cuts the context of what is
        longer.

        Raises:
            DataError: it is longer than the limit.
        """
        length, limit = self.length_of(encoded_text(context, question)), self.limit
        if length > limit.length:
            raise DataError(
                f"the text has {length:,} {limit.unit}, the encoder reads {limit.length:,}; cut it "
                "into several (`encode_chunks`, or --chunk-length of the command `encode`)"
            )

    def keep_states(self, folder: Path, *, rank: int) -> None:
        """Keep on disk what a frozen part computes of a text, if there is such a part.

        Args:
            folder: made when there is something to keep; `rank` keeps the files of processes apart.
        """

    def kept_bytes(self, context: str) -> int:
        """About how many bytes `keep_states` leads to for a text."""
        return 0

    def save(self, folder: Path) -> list[str]:
        """Write what `load` needs besides the settings and the weights.

        Returns:
            The files' names, relative to the folder.
        """
        return []

    @classmethod
    def load(cls, folder: Path, config: EncoderConfig) -> Encoder:
        """The encoder that was saved in a folder, before its weights are loaded."""
        return cls(config)


def build_encoder(config: EncoderConfig, readers: Mapping[str, Reader]) -> Encoder:
    """A fresh encoder of these settings.

    Args:
        readers: of the run, whose weights it may take.

    Raises:
        ConfigError: it cannot be built.
    """
    encoder: Encoder = ENCODERS.part_of(config).build(config, readers)
    return encoder


def rms_normalize(latent: Tensor) -> Tensor:
    """Each latent vector scaled to a root mean square of 1 (zero stays zero)."""
    return latent * torch.rsqrt(latent.pow(2).mean(-1, keepdim=True) + 1e-6)
