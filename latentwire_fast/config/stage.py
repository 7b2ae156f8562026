"""One stage of a training: what is trained on, for how long, and what changes meanwhile."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_type_hints

from latentwire_fast.config.base import Settings, require
from latentwire_fast.config.parts import MOST_LATENTS, ObjectiveConfig, ScheduleConfig, check_gain
from latentwire_fast.registry import OBJECTIVES, SCHEDULES

HandOver = Literal["first", "mean"]
# The numbers of a stage that may be scheduled, besides those of its objectives.
PLACES = ("gain", "latent_dropout", "dropout", "text_share")
FACTS = range(1, 19)  # how many facts a passage of the testbed may hold


@dataclass(frozen=True)
class StageConfig(Settings):
    """One training stage.

    Attributes:
        steps: optimiser steps.
        epochs: in the place of steps, passes over the data of the stage, which must have an end.
        source: train on this one of the pieces of `data.source` alone; None: on all of them.
        objectives: what is trained on, each kind at most once.
        facts: testbed: facts per passage over the steps of the stage; None: as in `DataConfig`.
        quantize: send latents through the bottleneck at these bits; None trains on the unquantised
            latent.
        lr: factor on the run's learning rates.
        batch_size: examples per step; None: the run's. Stages differ in what an example costs.
        hold_encoder: leave the encoder as it is, and train only what stands behind it. A first
            stage of `attention` needs this: an attachment first learns what all texts have in
            common, and an encoder that learns with it meanwhile makes all latents alike.
        frozen: parts that stay as they are: names of the model's modules or parameters, from the
            left (`encoder`, `attachments.llama`, `attachments.llama.soft.adapter`).
        readers: which of the run's readers are trained; none named: all.
        schedules: numbers that change over the steps of the stage, by place: `gain` (a factor on
            the strength of what readers get), `latent_dropout` (the share of the latents that
            readers get zeros for), `dropout` (in the place of every rate of dropout that trained
            parts have), `text_share` (in the place of `data.text_share`), or a field of an
            objective: `kd.weight`, `answer.tokens`.
        latents: of this stage, in the place of `encoder.latents`; no more than in the stage before.
            The last stage has the encoder's.
        hand_over: what has one entry for each latent keeps the `first` ones where this stage has
            fewer latents than the one before, or becomes the `mean` of neighbours.
    """

    name: str
    steps: int = 0
    objectives: tuple[ObjectiveConfig, ...] = field(
        default_factory=lambda: (OBJECTIVES.config("answer"),)
    )
    facts: ScheduleConfig | None = None
    quantize: int | None = None
    lr: float = 1.0
    batch_size: int | None = None
    hold_encoder: bool = False
    epochs: float | None = None
    source: str | None = None
    frozen: tuple[str, ...] = ()
    readers: tuple[str, ...] = ()
    schedules: dict[str, ScheduleConfig] = field(default_factory=dict, hash=False)
    latents: int | None = None
    hand_over: HandOver = "first"

    def __post_init__(self) -> None:
        super().__post_init__()
        stage = f"stage {self.name!r}"
        if self.epochs is None:
            require(self.steps >= 1, f"{stage}: steps={self.steps}, expected at least 1")
        else:
            require(self.epochs > 0, f"{stage}: epochs={self.epochs}, expected above 0")
            require(
                self.steps == 0,
                f"{stage}: epochs={self.epochs} and steps={self.steps}; give one of them",
            )
        kinds = Counter(objective.kind for objective in self.objectives)
        for kind, times in kinds.items():
            require(times == 1, f"{stage}: {times} objectives {kind!r}, expected each once")
        require(
            any(objective.weight for objective in self.objectives),
            f"{stage}: no objective with a weight above 0; add one to `objectives`",
        )
        require(
            self.batch_size is None or self.batch_size >= 1,
            f"{stage}: batch_size={self.batch_size}, expected at least 1, or none",
        )
        require(self.lr > 0, f"{stage}: lr={self.lr}, expected above 0")
        require(
            self.latents is None or 1 <= self.latents <= MOST_LATENTS,
            f"{stage}: latents={self.latents}, expected 1 to {MOST_LATENTS}, or none",
        )
        require(
            self.quantize is None or self.quantize >= 1,
            f"{stage}: quantize={self.quantize}, expected a width that the bottleneck has, or none",
        )
        self._check_facts()
        for place, schedule in self.schedules.items():
            self._check_schedule(place, schedule)
        self._check_weights()

    def _check_weights(self) -> None:
        """Raise where schedules leave no objective a weight; those by the accuracy may."""
        by_step: dict[str, ScheduleConfig] = {
            place.removesuffix(".weight"): config
            for place, config in self.schedules.items()
            if place.endswith(".weight")
        }
        if any(o.weight and o.kind not in by_step for o in self.objectives) or any(
            config.needs_accuracy for config in by_step.values()
        ):
            return
        total = self.steps or 100
        schedules = [SCHEDULES.part_of(config)(config) for config in by_step.values()]
        for step in range(0, total, max(1, total // 100)):
            require(
                any(schedule.value(step, total) for schedule in schedules),
                f"stage {self.name!r}: schedules: no objective has a weight above 0 at step {step}",
            )

    def _check_schedule(self, place: str, config: ScheduleConfig) -> None:
        where = f"stage {self.name!r}: schedules[{place!r}]"
        kind, _, name = place.partition(".")
        objectives = {objective.kind: objective for objective in self.objectives}
        known = [f"{k}.{f.name}" for k, o in objectives.items() for f in fields(o)]
        require(
            place in (*PLACES, *known),
            f"{where}: expected {', '.join(PLACES)}, or one of {', '.join(known)}",
        )
        require(
            place != "text_share" or (self.takes_texts and not config.needs_accuracy),
            f"{where}: it is for stages that learn from texts without questions, by the step alone",
        )
        require(
            not config.needs_accuracy or any(o.reports_accuracy for o in self.objectives),
            f"{where}: {config.kind!r} goes by the accuracy of answers, and no objective of the "
            "stage reports one; add answer (with weight 0, it is reported only)",
        )
        schedule = SCHEDULES.part_of(config)(config)
        total = self.steps or 100  # of a stage in epochs the data says how many
        for step in (*range(0, total, max(1, total // 100)), total - 1):
            value = schedule.value(step, total)
            if place == "gain":
                check_gain(where, value)
            elif place in ("latent_dropout", "dropout"):
                require(0 <= value < 1, f"{where}: {value:g}, expected in [0, 1)")
            elif place == "text_share":
                require(0 <= value <= 1, f"{where}: {value:g}, expected 0 to 1")
            else:
                with_level(objectives[kind], name, value)

    def _check_facts(self) -> None:
        stage = f"stage {self.name!r}"
        if self.facts is not None:
            require(
                not self.facts.needs_accuracy,
                f"{stage}: facts: {self.facts.kind!r} goes by the accuracy of answers, which is "
                "for a stage's `schedules`",
            )
            schedule = SCHEDULES.part_of(self.facts)(self.facts)
            for facts in {schedule.value(step, self.steps) for step in range(self.steps)}:
                require(
                    facts in FACTS,
                    f"{stage}: facts={facts:g}, expected a whole number from 1 to 18",
                )

    @property
    def needs_accuracy(self) -> bool:
        """Whether something in it goes by how often answers are right."""
        return any(schedule.needs_accuracy for schedule in self.schedules.values())

    @property
    def takes_texts(self) -> bool:
        """Whether there is something to learn from a text without questions."""
        return any(o.weight and not o.reads_answers for o in self.objectives)


def with_level(config: ObjectiveConfig, name: str, value: float) -> ObjectiveConfig:
    """An objective's settings with one of their numbers as a schedule gives it; a field of whole
    numbers takes what is below it.

    Raises:
        ConfigError: the field takes no such number.
    """
    is_whole = get_type_hints(type(config))[name] in (int, int | None)
    change: dict[str, Any] = {name: int(value) if is_whole else value}
    return replace(config, **change)
