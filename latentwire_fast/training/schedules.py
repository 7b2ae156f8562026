"""What changes with the step: the learning rate and the curriculum. Pure functions, so that
resuming needs no state."""

from __future__ import annotations

import math
from collections.abc import Sequence

from latentwire_fast.config.schema import RunConfig, StageConfig


def lr_factor(config: RunConfig, step: int, stage: StageConfig) -> float:
    """Linear warm-up, flat, then half a cosine to zero from `decay_from` of all steps on."""
    optim = config.optim
    share = step / config.total_steps
    warm = min(1.0, (step + 1) / max(1, optim.warmup_steps))
    if share <= optim.decay_from:
        return stage.lr * warm
    progress = (share - optim.decay_from) / (1 - optim.decay_from)
    return stage.lr * warm * 0.5 * (1 + math.cos(math.pi * progress))


def facts_at(schedule: Sequence[tuple[float, int]], share: float, default: int) -> int:
    """The curriculum's level after `share` of a stage."""
    for until, facts in schedule:
        if share < until:
            return facts
    return schedule[-1][1] if schedule else default
