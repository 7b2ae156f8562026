"""The scheduled numbers of a step: a stage's gain, dropout, share of texts, and fields of its
objectives.

Most schedules are functions of the step alone. A `gated` one goes by the answers' accuracy: its
progress, and the running mean of the accuracy, are part of a run's state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor

from latentwire_fast.config.schema import ScheduleConfig, StageConfig
from latentwire_fast.schedules.base import AccuracySchedule, build_schedule

KEPT = 0.9  # share of the accuracy's running mean that stays at each step
ACCURACIES = ("first_token_accuracy", "accuracy")  # the first of them that a step reports


@dataclass
class Gates:
    """What gated schedules have seen.

    Attributes:
        progress: from 0 to 1, by `STAGE/PLACE`.
        accuracy: running mean over the steps of the mean over readers; None before the first.
    """

    progress: dict[str, float] = field(default_factory=dict)
    accuracy: float | None = None

    @property
    def state(self) -> dict[str, Any]:
        """As JSON, for checkpoints."""
        return {"progress": self.progress, "accuracy": self.accuracy}

    @state.setter
    def state(self, saved: Mapping[str, Any]) -> None:
        self.progress, self.accuracy = dict(saved["progress"]), saved["accuracy"]

    def levels(self, stage: StageConfig, done: int) -> dict[str, float]:
        """The numbers of a stage behind so many of its steps, by place, as in its `schedules`."""
        found = {}
        for place, config in stage.schedules.items():
            if config.needs_accuracy:
                progress = self.progress.get(f"{stage.name}/{place}", 0.0)
                found[place] = _by_accuracy(config).at(progress)
            else:
                found[place] = build_schedule(config).value(done, stage.steps)
        return found

    def text_batches(self, stage: StageConfig, done: int) -> tuple[int, int] | None:
        """Batches of texts before the next step of a stage and with it, counted from the stage's
        first step; None where their share is not scheduled."""
        config = stage.schedules.get("text_share")
        if config is None:
            return None
        schedule = build_schedule(config)
        before = sum(schedule.value(i, stage.steps) for i in range(done))
        return int(before), int(before + schedule.value(done, stage.steps))

    def watch(self, stage: StageConfig, parts: Mapping[str, Tensor]) -> None:
        """Take in what a step reported, as `MEASURE/READER`; nothing where no schedule asks."""
        gated = {
            place: _by_accuracy(config)
            for place, config in stage.schedules.items()
            if config.needs_accuracy
        }
        if not gated:
            return
        for measure in ACCURACIES:
            found = [v.item() for key, v in parts.items() if key.split("/")[0] == measure]
            if found:
                break
        else:  # a batch of texts without questions
            return
        now = sum(found) / len(found)
        before = now if self.accuracy is None else self.accuracy
        self.accuracy = KEPT * before + (1 - KEPT) * now
        for place, schedule in gated.items():
            key = f"{stage.name}/{place}"
            self.progress[key] = schedule.advance(self.progress.get(key, 0.0), self.accuracy)


def _by_accuracy(config: ScheduleConfig) -> AccuracySchedule:
    return cast(AccuracySchedule, build_schedule(config))
