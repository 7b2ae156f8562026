"""The whole configuration of a run as frozen dataclasses. Presets are functions in `presets.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from latentwire_fast.config.base import Settings, require
from latentwire_fast.config.evaluation import ContinuationConfig, EvalConfig, check_decoding
from latentwire_fast.config.latents import check_latents, has_curriculum
from latentwire_fast.config.lora import LoraSettings
from latentwire_fast.config.parts import (
    BITS,
    AdapterConfig,
    AttachmentConfig,
    BottleneckConfig,
    Calibration,
    EncoderConfig,
    Language,
    Mode,
    ObjectiveConfig,
    PoolerConfig,
    ScheduleConfig,
)
from latentwire_fast.config.prompt import PromptConfig, TemplateConfig
from latentwire_fast.config.reader import ReaderConfig, check_reader_name
from latentwire_fast.config.stage import FACTS, StageConfig, with_level
from latentwire_fast.config.validation import ValidationConfig
from latentwire_fast.registry import ATTACHMENTS, BOTTLENECKS, ENCODERS, SCHEDULES

TRACKERS = ("tensorboard", "wandb", "trackio")
# Users of a configuration find all of it here, the settings of its parts with the rest.
__all__ = [
    "BITS",
    "FACTS",
    "AdapterConfig",
    "AttachmentConfig",
    "BottleneckConfig",
    "Calibration",
    "ContinuationConfig",
    "DataConfig",
    "EncoderConfig",
    "EvalConfig",
    "Language",
    "LoraSettings",
    "Mode",
    "ObjectiveConfig",
    "OptimConfig",
    "PoolerConfig",
    "PromptConfig",
    "ReaderConfig",
    "RunConfig",
    "ScheduleConfig",
    "StageConfig",
    "TemplateConfig",
    "ValidationConfig",
    "check_decoding",
    "check_reader_name",
    "with_level",
]


@dataclass(frozen=True)
class DataConfig(Settings):
    """Where examples come from.

    Attributes:
        source: `testbed`, a SQuAD-format file (with `[A:B]` behind it, some of its articles), a
            saved `datasets` folder, `text=FILE` (paragraphs without questions), `NAME=PATH` (rows
            of the set NAME), `hub:NAME`; several of these with `+` between them, or with commas
            for equal shares (`A@3,B@1`: three examples of A for each of B).
        eval_source: what the run is scored on, in the same form; None: the held-out part of
            `source`. No context may be in both.
        text_share: share of the batches that are paragraphs without questions, in stages that can
            use them; None: their share of the data.
        max_context_tokens: examples with a longer context, in any reader's tokens, are left out.
        train_contexts: train on at most so many contexts, drawn by `seed`; None: all. What frozen
            models make of a context is computed once: fewer are seen more often in the same time.
        chunk_length: contexts are cut at sentence ends into chunks of at most so many of the
            encoder's tokens (of its bytes, where it reads these), each with a latent of its own;
            None: one latent for each context, and what is too long for it is cut off.
        facts: testbed: facts per passage at the end of the curriculum.
        similar: testbed: share of training passages with only two kinds of facts, which have to
            be told apart.
        questions_per_context: context mode asks several questions of one latent per step.
        eval_examples, eval_seed: size and seed of the held-out set.
        language: whose rules compare answers: SQuAD's (`en`), or MLQA's for other languages.
    """

    source: str = "testbed"
    eval_source: str | None = None
    text_share: float | None = None
    max_context_tokens: int | None = None
    train_contexts: int | None = None
    chunk_length: int | None = None
    facts: int = 4
    similar: float = 0.0
    questions_per_context: int = 4
    eval_examples: int = 500
    eval_seed: int = 99
    language: Language = "en"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.facts in FACTS, f"facts={self.facts}, expected 1 to 18")
        require(0 <= self.similar <= 1, f"similar={self.similar}, expected 0 to 1")
        self.at_least_one(
            "questions_per_context",
            "eval_examples",
            "max_context_tokens",
            "train_contexts",
            "chunk_length",
        )
        share = self.text_share
        require(share is None or 0 <= share <= 1, f"text_share={share}, expected 0 to 1, or none")


@dataclass(frozen=True)
class OptimConfig(Settings):
    """Optimiser, learning rates and batches.

    Attributes:
        encoder_lr: factor on both learning rates for the encoder's pretrained LM.
        lr_schedule: factor on all learning rates over the steps of the run.
        micro_batch: examples per forward pass; None begins with the whole batch.
        readers: `sum` adds the losses of all readers and goes backward once. `sequential` goes
            backward after each reader: the same gradients with one reader's activations in memory
            at a time. `alternate` trains one reader per step, in turn.
        mixed_precision: `bf16` is fp32 on a CPU that would have to emulate it.
    """

    muon_lr: float | None = 0.01
    encoder_lr: float = 1.0
    adamw_lr: float = 2e-3
    weight_decay: float = 0.0
    lr_schedule: ScheduleConfig = field(default_factory=lambda: SCHEDULES.config("warmup_cosine"))
    clip: float = 1.0
    batch_size: int = 24
    micro_batch: int | None = None
    readers: Literal["sum", "sequential", "alternate"] = "sum"
    mixed_precision: Literal["no", "bf16"] = "no"
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least_one("batch_size", "micro_batch")
        for name in ("adamw_lr", "encoder_lr", "clip"):
            value = getattr(self, name)
            require(value > 0, f"{name}={value}, expected above 0")
        require(
            self.muon_lr is None or self.muon_lr > 0,
            f"muon_lr={self.muon_lr}, expected above 0, or none for AdamW alone",
        )
        require(self.weight_decay >= 0, f"weight_decay={self.weight_decay}, expected at least 0")


@dataclass(frozen=True)
class RunConfig(Settings):
    """Everything that makes a run what it is.

    Attributes:
        base: a trained run whose encoder is taken over and kept as it is, with its mode and
            bottleneck: this run's readers learn to read the payloads that are out there.
        attachments: what each reader is given of a latent; no two of them the same thing.
        validation: scores while it trains; None for none.
        threads: of torch on a CPU; None leaves them to torch.
        log_every, save_every: steps between diagnostics and between checkpoints.
        minutes: of training at most; None for no limit. Where the time is too short for all steps,
            steps are left out evenly, so that every stage and the learning rate come to their end.
        warm_start: parts that begin as in another run: its folder by the part's name, from the left
            (`encoder`, `attachments.llama`), or `all` for everything that both have.
        private_slots: how many of the encoder's latents are one reader's own, by its name; the
            others are for all readers. Each reader gets the shared ones and its own.
        loss_norms_every: steps between two measurements of each loss's own gradient; None for none.
        trackers: what shows the numbers of the log: `tensorboard`, `wandb`, `trackio`. The log
            itself, `diagnostics.jsonl`, is always written.
    """

    preset: str = "custom"
    base: str | None = None
    mode: Mode = "context"
    seed: int = 0
    threads: int | None = None
    readers: dict[str, ReaderConfig] = field(default_factory=dict)
    encoder: EncoderConfig = field(default_factory=lambda: ENCODERS.config("lm"))
    bottleneck: BottleneckConfig = field(default_factory=lambda: BOTTLENECKS.config("uniform"))
    attachments: tuple[AttachmentConfig, ...] = field(
        default_factory=lambda: (ATTACHMENTS.config("soft"),)
    )
    data: DataConfig = field(default_factory=DataConfig)
    stages: tuple[StageConfig, ...] = ()
    optim: OptimConfig = field(default_factory=OptimConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    validation: ValidationConfig | None = None
    log_every: int = 10
    save_every: int = 200
    minutes: float | None = None
    warm_start: dict[str, str] = field(default_factory=dict)
    loss_norms_every: int | None = None
    private_slots: dict[str, int] = field(default_factory=dict)
    trackers: tuple[str, ...] = ("tensorboard",)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.readers), "readers: at least one reader is needed (NAME=PATH)")
        for name in self.readers:
            check_reader_name(name)
        require(bool(self.stages), "stages: at least one training stage is needed")
        self.at_least_one("log_every", "save_every", "threads", "loss_norms_every")
        require(
            self.minutes is None or self.minutes > 0, f"minutes={self.minutes}, expected above 0"
        )
        self._check_trackers()
        self._check_attachments()
        self._check_objectives()
        require(
            self.mode == "context" or self.evaluation.continuation is None,
            "evaluation.continuation needs mode='context': a text has no question to encode",
        )
        require(0 <= self.seed < 2**31, f"seed={self.seed}, expected 0 to 2,147,483,647")
        self._check_stages()
        self._check_slots()
        self._check_chunks()
        require(
            self.base is None or "encoder" not in self.warm_start,
            "warm_start: the encoder is the base's, and stays as it is; leave out one of them",
        )
        for part in (self.encoder, self.bottleneck, *self.attachments):
            part.check(self)

    def _check_trackers(self) -> None:
        for name in self.trackers:
            require(
                name in TRACKERS and self.trackers.count(name) == 1,
                f"trackers: {name!r}, expected each at most once of {', '.join(TRACKERS)}",
            )

    def _check_attachments(self) -> None:
        require(bool(self.attachments), "attachments: at least one is needed, such as soft")
        for attachment in self.attachments:
            place = attachment.gives
            rivals = [other.kind for other in self.attachments if other.gives == place]
            require(
                len(rivals) == 1,
                f"attachments: {attachment.kind!r} is not the only one that makes a reader's "
                f"{place} ({' and '.join(map(repr, rivals))} do); keep one of them",
            )

    def _check_chunks(self) -> None:
        require(
            self.scored_chunk_length is None or not self.gives("layers"),
            "chunk_length makes several latents of a text, and an attachment between a reader's "
            "layers ('cross_attention') reads one; leave out one of them",
        )

    def _check_slots(self) -> None:
        for name, count in self.private_slots.items():
            where = f"private_slots[{name!r}]"
            require(count >= 1, f"{where}={count}, expected at least 1; leave out a reader with 0")
            require(
                name in self.readers or self.base is not None,  # the base's readers have them
                f"{where}: the run's readers are {sorted(self.readers)}; name one of them",
            )
        private, latents = sum(self.private_slots.values()), self.encoder.latents
        require(
            private < latents,
            f"private_slots: {private} of {latents} latents; leave one at least for all readers",
        )

    def _check_stages(self) -> None:
        for bits in set(self.evaluation.bits) - set(BITS):
            self.bottleneck.require_rate(bits, "evaluation: bits")
        check_latents(self.stages, self.encoder.latents, base=self.base, validation=self.validation)
        require(
            not has_curriculum(self.stages, self.encoder.latents)
            or not (self.private_slots or getattr(self.bottleneck, "prior", "flat") != "flat"),
            "stages: latents become fewer, and private_slots and a bottleneck's learned prior are "
            "about places among all of them; leave them out, or take prior='flat'",
        )
        for stage in self.stages:
            if stage.quantize is not None:
                place = f"stage {stage.name!r}: quantize"
                self.bottleneck.require_rate(stage.quantize, place)
            unknown = sorted(set(stage.readers) - set(self.readers))
            require(
                not unknown,
                f"stage {stage.name!r}: readers={unknown}, this run has {sorted(self.readers)}",
            )
        last = self.stages[-1].schedules.get("gain")
        if last is not None:
            steps = self.stages[-1].steps or 1
            end = SCHEDULES.part_of(last)(last).value(steps, steps)
            require(
                abs(end - 1) < 0.01,
                f"stages: the last one's gain ends at {end:g}, and a receiver applies 1; let it "
                "end there, or set the attachment's own gain",
            )
        require(
            not self.optim.lr_schedule.needs_accuracy,
            f"optim.lr_schedule: {self.optim.lr_schedule.kind!r} goes by the accuracy of answers, "
            "which is for a stage's `schedules`",
        )

    def _check_objectives(self) -> None:
        objectives = [objective for stage in self.stages for objective in stage.objectives]
        for objective in objectives:
            require(
                self.mode in objective.modes,
                f"objective {objective.kind!r} needs mode={' or '.join(map(repr, objective.modes))}"
                f", this run has mode={self.mode!r}",
            )
            require(
                self.base is None or not objective.of_latents,
                f"objective {objective.kind!r} trains latents, and the encoder of {self.base} "
                "stays as it is; leave it out",
            )
            require(
                self.data.chunk_length is None or objective.takes_chunks,
                f"objective {objective.kind!r} is about one latent of each text, and "
                "data.chunk_length makes several; leave out one of them, or train without chunks "
                "first and go on from that run (`warm_start`)",
            )
            require(
                not self.encoder.varies or objective.takes_fewer,
                f"objective {objective.kind!r} is about M latents of each text, and "
                "encoder.tokens_per_latent makes fewer of some; leave out one of them",
            )
            objective.check(self)
        for stage in self.stages:
            batch = stage.batch_size or self.optim.batch_size
            alone = min(batch, self.optim.micro_batch or batch) == 1
            kinds = [o.kind for o in stage.objectives if o.compares_texts]
            require(
                not (alone and kinds),
                f"stage {stage.name!r}: {' and '.join(kinds)} compares the texts of a micro-batch, "
                "which holds one; make batch_size and optim.micro_batch larger",
            )
        self._check_heads(objectives)
        begins_trained = any(part.split(".")[0] in ("all", "encoder") for part in self.warm_start)
        require(
            not self.encoder.selects_positions
            or self.base is not None
            or begins_trained
            or any(objective.teaches_positions and objective.weight for objective in objectives),
            "encoder pooler 'selected' and an objective that teaches positions ('select') need "
            "each other: add it to a stage, or begin as in a run that has learned them "
            "(`warm_start`)",
        )

    def _check_heads(self, objectives: list[ObjectiveConfig]) -> None:
        """Raise where stages want one objective's head, which they share, in several shapes."""
        shapes: dict[str, tuple[Any, ...]] = {}
        for objective in objectives:
            names = objective.head_fields
            shape = tuple(getattr(objective, name) for name in names)
            require(
                shapes.setdefault(objective.kind, shape) == shape,
                f"stages: objective {objective.kind!r} has one head for all of them; give it the "
                f"same {', '.join(names)} in each",
            )

    @property
    def scored_chunk_length(self) -> int | None:
        """The length of the chunks that scored contexts are cut into; None: they are whole."""
        return self.evaluation.chunk_length or self.data.chunk_length

    def gives(self, place: str) -> bool:
        """Whether an attachment makes this entry of a reader's inputs."""
        return any(attachment.gives == place for attachment in self.attachments)

    @property
    def total_steps(self) -> int:
        """Optimiser steps of all stages; without those in epochs, which the data decides."""
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> tuple[StageConfig, int]:
        """The stage of a 0-based step of the run, and how many steps of it are done by then."""
        for stage in self.stages:
            if step < stage.steps:
                return stage, step
            step -= stage.steps
        return self.stages[-1], self.stages[-1].steps
