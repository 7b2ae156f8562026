"""Parts of a model by name: those that a stage leaves as they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from latentwire_fast.config.base import require
from latentwire_fast.config.schema import StageConfig


def is_within(name: str, parts: Iterable[str]) -> bool:
    """Whether a parameter is one of some parts or in one (`encoder.norm.weight` in `encoder`)."""
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def check_frozen(stages: Sequence[StageConfig], names: Sequence[str]) -> None:
    """Raise unless the parts that stages freeze are there, and leave something to train.

    Args:
        names: of all trained parameters.

    Raises:
        ConfigError: they are not, or do not.
    """
    for stage in stages:
        for part in stage.frozen:
            require(
                any(is_within(name, [part]) for name in names),
                f"stage {stage.name!r}: frozen={part!r} is no trained part of this run; there are "
                f"{', '.join(known_parts(names))}",
            )
        require(
            not all(is_within(name, stage.frozen) for name in names),
            f"stage {stage.name!r}: everything is frozen; leave out one of "
            f"{', '.join(stage.frozen)}",
        )


def known_parts(names: Iterable[str]) -> list[str]:
    """What a user may name: the encoder, attachments of a reader, task tokens, low-rank updates."""
    depths = {"encoder": 1, "attachments": 3}
    found = {".".join(name.split(".")[: depths.get(name.split(".")[0], 2)]) for name in names}
    return sorted(found)
