"""The base classes of the settings of registered parts: fields that all parts of one kind have.

A part's own settings are the class `Config` nested in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from latentwire_fast.config.base import PartSettings, require
from latentwire_fast.registry import (
    ADAPTERS,
    ATTACHMENTS,
    BOTTLENECKS,
    ENCODERS,
    OBJECTIVES,
    POOLERS,
    SCHEDULES,
    Registry,
)

Mode = Literal["context", "pure"]
Language = Literal["en", "ar", "de", "es", "hi", "vi", "zh"]  # whose rules compare answers
Calibration = Literal["none", "token", "example", "batch"]
BITS = (16, 8, 6, 4)
MOST_LATENTS = 65535  # that a header of the wire format can tell


@dataclass(frozen=True)
class EncoderConfig(PartSettings):
    """Text to latent: what the settings of every encoder have (`models/encoders/`).

    Attributes:
        latents, d_z: the latent is `[latents, d_z]`.
    """

    registry: ClassVar[Registry] = ENCODERS

    latents: int = 12
    d_z: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            1 <= self.latents <= MOST_LATENTS,
            f"latents={self.latents}, expected 1 to {MOST_LATENTS}",
        )
        require(1 <= self.d_z <= 65535, f"d_z={self.d_z}, expected 1 to 65535")

    @property
    def source(self) -> str | None:
        """Where its pretrained LM comes from: a field of encoders that start from one, else
        None."""
        return None

    @property
    def selects_positions(self) -> bool:
        """Whether its latents stand at positions of the text, which a stage has to teach it."""
        return False

    @property
    def texts_to_fit(self) -> int:
        """How many training texts a fresh encoder is fitted to (`Encoder.fit`); 0 for none."""
        return 0

    @property
    def varies(self) -> bool:
        """Whether a text may get fewer latents than `latents`."""
        return False

    @property
    def hints(self) -> bool:
        """Whether its last latent is a hint about the answer (`Encoder.with_hints`)."""
        return False

    def with_source(self, source: str) -> EncoderConfig:
        """A copy of these settings that starts from another LM.

        Raises:
            ConfigError: it starts from no LM.
        """
        require(
            self.source is not None, f"encoder {self.kind!r} starts from no LM: leave out --encoder"
        )
        changes: dict[str, Any] = {"source": source}
        return replace(self, **changes)

    def map_sources(self, change: Callable[[str], str]) -> EncoderConfig:
        """A copy whose pretrained models have changed names, such as absolute paths."""
        return self if self.source is None else self.with_source(change(self.source))

    def allows(self, trained: EncoderConfig) -> bool:
        """Whether a trained encoder is one that these settings ask for."""
        return self == trained


@dataclass(frozen=True)
class PoolerConfig(PartSettings):
    """An LM's hidden states to M latents (`models/poolers/`)."""

    registry: ClassVar[Registry] = POOLERS

    @property
    def selects_positions(self) -> bool:
        """Whether its states are those of positions of the text, which a stage has to teach it."""
        return bool(self.registry.part_of(self).selects_positions)

    @property
    def varies(self) -> bool:
        """Whether it can make fewer than M latents of a text."""
        return bool(self.registry.part_of(self).varies)

    @property
    def needs_lm(self) -> bool:
        """Whether it works in an encoder with a causal LM only."""
        return bool(self.registry.part_of(self).needs_lm)

    def check_states_alone(self, encoder: EncoderConfig) -> None:
        """Raise unless it works in an encoder that has token states, and no causal LM.

        Raises:
            ConfigError: it needs one, or readers' positions.
        """
        require(
            not (self.needs_lm or self.selects_positions),
            f"pooler {self.kind!r} needs a causal LM, which encoder {encoder.kind!r} does not "
            "have; take another pooler, or encoder 'lm'",
        )


@dataclass(frozen=True)
class BottleneckConfig(PartSettings):
    """The wire's precision: what the settings of every bottleneck have (`models/bottlenecks/`).

    Attributes:
        bits: the width that is sent unless another is asked for, as the bottleneck counts it: per
            value, per channel or per latent.
    """

    registry: ClassVar[Registry] = BOTTLENECKS

    bits: int = 6

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_rate(self.bits, "bits")

    @property
    def rates(self) -> tuple[int, ...]:
        """The widths that can be sent, the largest first."""
        return BITS

    def require_rate(self, bits: int, name: str) -> None:
        """Raise unless this width can be sent.

        Raises:
            ConfigError: it cannot; the message calls it `name`.
        """
        *more, last = map(str, self.rates)
        known = f"{', '.join(more)} or {last}" if more else last
        require(bits in self.rates, f"{name}={bits}, expected {known}")


@dataclass(frozen=True)
class AdapterConfig(PartSettings):
    """Latent to what is projected into a reader's embeddings (`models/adapters/`)."""

    registry: ClassVar[Registry] = ADAPTERS


# Soft tokens a thousand times as large as a reader's own embeddings drown everything else; not far
# beyond, half precision overflows and the answer is empty.
MOST_GAIN = 1000.0


def check_gain(name: str, gain: float) -> None:
    """Raise unless prefixes may be so many times as strong as what was measured or trained.

    Raises:
        ConfigError: 0 or below, above `MOST_GAIN`, or NaN.
    """
    require(
        0 < gain <= MOST_GAIN,
        f"{name}={gain}, expected above 0 and at most {MOST_GAIN:g}",
    )


@dataclass(frozen=True)
class AttachmentConfig(PartSettings):
    """Latent to something that one reader takes in (`models/attachments/`)."""

    registry: ClassVar[Registry] = ATTACHMENTS

    @property
    def gives(self) -> str:
        """The entry of a reader's inputs that it makes."""
        place: str = self.registry.part_of(self).gives
        return place

    @property
    def varies(self) -> bool:
        """Whether it takes a latent with fewer than M vectors."""
        return bool(self.registry.part_of(self).varies)

    @property
    def starts_from_texts(self) -> bool:
        """Whether a fresh one begins with what its reader computes of a few training texts."""
        return False


@dataclass(frozen=True)
class ScheduleConfig(PartSettings):
    """How a number changes over the steps of a run or of a stage (`schedules/`)."""

    registry: ClassVar[Registry] = SCHEDULES

    @property
    def needs_accuracy(self) -> bool:
        """Whether it goes by how often answers are right, and not by the step alone."""
        return False


@dataclass(frozen=True)
class ObjectiveConfig(PartSettings):
    """One thing that a stage trains on (`objectives/`).

    Attributes:
        weight: its factor in the stage's loss; with 0 it is computed and reported, not trained on.
        modes: the modes that it has a meaning in.
        teaches_positions: whether it teaches an encoder which positions become latents.
        reports_accuracy: whether it reports how often the answers' tokens are right.
        reads_answers: whether it is about questions and answers; a text without any is then no
            item for it.
        of_latents: whether it is about latents alone, before any reader: a run on a base, which
            keeps its encoder, has nothing to learn from it.
        head_fields: the settings that decide the shape of its head (`Objective.build_head`).
        takes_chunks: whether a text may be several latents, one for each of its chunks.
        takes_fewer: whether a latent may have fewer than M vectors.
    """

    registry: ClassVar[Registry] = OBJECTIVES
    modes: ClassVar[tuple[Mode, ...]] = ("context", "pure")
    teaches_positions: ClassVar[bool] = False
    reads_answers: ClassVar[bool] = False
    reports_accuracy: ClassVar[bool] = False
    of_latents: ClassVar[bool] = False
    head_fields: ClassVar[tuple[str, ...]] = ()
    takes_chunks: ClassVar[bool] = False
    takes_fewer: ClassVar[bool] = False

    weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.weight >= 0, f"objective {self.kind!r}: weight={self.weight}, expected at least 0"
        )

    @property
    def compares_texts(self) -> bool:
        """Whether it says nothing of a micro-batch of one text."""
        return False

    def map_sources(self, change: Callable[[str], str]) -> ObjectiveConfig:
        """A copy whose pretrained models have changed names, such as absolute paths."""
        return self
