"""Checks of a curriculum of latents: stages that have more of them than the model ends with."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from latentwire_fast.config.base import require
from latentwire_fast.config.stage import StageConfig
from latentwire_fast.config.validation import ValidationConfig


def stage_latents(stage: StageConfig, final: int) -> int:
    """How many latents a stage has, in a run whose model ends with so many."""
    return final if stage.latents is None else stage.latents


def has_curriculum(stages: Sequence[StageConfig], final: int) -> bool:
    """Whether not all stages have the same number of latents."""
    return any(stage_latents(stage, final) != final for stage in stages)


def check_latents(
    stages: Sequence[StageConfig],
    final: int,
    *,
    base: str | None,
    validation: ValidationConfig | None,
) -> None:
    """Raise unless the numbers of latents only fall, down to the model's.

    Args:
        final: `encoder.latents`.

    Raises:
        ConfigError: they do not; or the model that is kept might have another number.
    """
    counts = [stage_latents(stage, final) for stage in stages]
    for stage, fewer, more in zip(stages, counts, [0, *counts], strict=False):
        require(
            stage.hand_over == "first" or (fewer != more and more != 0),
            f"stage {stage.name!r}: hand_over={stage.hand_over!r} is for a stage with fewer "
            "latents than the one before; leave it out, or set latents",
        )
    if not has_curriculum(stages, final):
        return
    for before, after in pairwise(stages):
        fewer, more = stage_latents(after, final), stage_latents(before, final)
        require(
            fewer <= more,
            f"stage {after.name!r}: latents={fewer} behind {more}; they may only become fewer",
        )
    last = stage_latents(stages[-1], final)
    require(
        last == final,
        f"stage {stages[-1].name!r}: latents={last}, and the model ends with "
        f"encoder.latents={final}; leave it out in the last stage",
    )
    require(
        base is None,
        f"stages: the encoder of {base} has {final} latents and stays as it is; leave out latents",
    )
    require(
        validation is None or not (validation.use_best or validation.patience),
        "validation: with use_best or patience, the model that is kept might be of a stage with "
        "more latents; leave them out",
    )
