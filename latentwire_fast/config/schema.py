"""The whole configuration of a run as frozen dataclasses. Presets are functions in `presets.py`."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from torch import nn

from latentwire_fast.config.base import Settings, require
from latentwire_fast.config.lora import LoraSettings
from latentwire_fast.config.parts import (
    BITS,
    AdapterConfig,
    AttachmentConfig,
    BottleneckConfig,
    Calibration,
    EncoderConfig,
    Mode,
    ObjectiveConfig,
    PoolerConfig,
    ScheduleConfig,
)
from latentwire_fast.config.prompt import PromptConfig, TemplateConfig
from latentwire_fast.config.validation import ValidationConfig
from latentwire_fast.registry import ATTACHMENTS, BOTTLENECKS, ENCODERS, OBJECTIVES, SCHEDULES

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
]

FACTS = range(1, 19)  # how many facts a passage of the testbed may hold


def check_decoding(temperature: float, top_p: float, eos_ban_steps: int) -> None:
    """Raise unless answers can be decoded with these (temperature 0 is greedy).

    Raises:
        ConfigError: a value outside its range.
    """
    require(
        0 <= temperature < math.inf, f"first_token_temperature={temperature}, expected 0 or above"
    )
    require(0 < top_p <= 1, f"first_token_top_p={top_p}, expected in (0, 1]")
    require(eos_ban_steps >= 0, f"eos_ban_steps={eos_ban_steps}, expected at least 0")


# Names that no reader may have: its name is a key of these two classes, beside "encoder".
_RESERVED_NAMES = {"encoder", *dir(nn.ModuleDict()), *dir(nn.ParameterDict())}


def check_reader_name(name: str) -> None:
    """Raise unless a reader can be called so.

    Raises:
        ConfigError: something but letters, digits, _ and -, or a name that has a meaning already.
    """
    require(
        re.fullmatch(r"\w[\w-]*", name) is not None,
        f"reader name {name!r}: give it one of letters, digits, _ and - that does not begin with -",
    )
    require(name not in _RESERVED_NAMES, f"reader name {name!r} is taken; give the reader another")


@dataclass(frozen=True)
class ReaderConfig(PromptConfig):
    """One frozen LLM, and how it is asked (the settings of `PromptConfig`).

    Attributes:
        source: a local folder, a .gguf file, `package:NAME`, a hub id or `testbed:NAME`.
        dtype: that the weights are loaded in; the reader is known by them.
        compute_dtype: that the weights are cast to afterwards; None leaves them.
        attn_implementation: `sdpa`, `eager`, or `flash_attention_2` (package flash-attn).
        device_map: of transformers: `auto` spreads the reader over the GPUs.
        max_memory: with a device map, what the reader may take: `20GiB` of each GPU, or named by
            device, `0=20GiB,1=40GiB,cpu=60GiB`; what is left then goes to disk.
        load_in_4bit: NF4 weights of bitsandbytes.
        lora: low-rank updates that are trained with the run: the reader is not frozen then. None
            for none.
    """

    source: str
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attn_implementation: str = "sdpa"
    device_map: str | None = None
    load_in_4bit: bool = False
    max_memory: str | None = None
    compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    lora: LoraSettings | None = None

    @property
    def weights(self) -> ReaderConfig:
        """These settings as if it were asked in the usual way: what decides its weights."""
        changes: dict[str, Any] = {f.name: f.default for f in fields(PromptConfig)}
        return replace(self, **changes)


@dataclass(frozen=True)
class DataConfig(Settings):
    """Where examples come from.

    Attributes:
        source: `testbed`, a SQuAD-format file (with `[A:B]` behind it, some of its articles), a
            saved `datasets` folder, `text=FILE` (paragraphs without questions), `NAME=PATH` (rows
            of the set NAME), `hub:NAME`; several of these with `+` between them, or with commas
            for equal shares.
        eval_source: what the run is scored on, in the same form; None: the held-out part of
            `source`. No context may be in both.
        text_share: share of the batches that are paragraphs without questions, in stages that can
            use them; None: their share of the data.
        max_context_tokens: examples with a longer context, in any reader's tokens, are left out.
        facts: testbed: facts per passage at the end of the curriculum.
        similar: testbed: share of training passages with only two kinds of facts, which have to
            be told apart.
        questions_per_context: context mode asks several questions of one latent per step.
        eval_examples, eval_seed: size and seed of the held-out set.
    """

    source: str = "testbed"
    eval_source: str | None = None
    text_share: float | None = None
    max_context_tokens: int | None = None
    facts: int = 4
    similar: float = 0.0
    questions_per_context: int = 4
    eval_examples: int = 500
    eval_seed: int = 99

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.facts in FACTS, f"facts={self.facts}, expected 1 to 18")
        require(0 <= self.similar <= 1, f"similar={self.similar}, expected 0 to 1")
        self.at_least_one("questions_per_context", "eval_examples", "max_context_tokens")
        share = self.text_share
        require(share is None or 0 <= share <= 1, f"text_share={share}, expected 0 to 1, or none")


@dataclass(frozen=True)
class StageConfig(Settings):
    """One training stage.

    Attributes:
        steps: optimiser steps.
        objectives: what is trained on, each kind at most once.
        facts: testbed: facts per passage over the steps of the stage; None: as in `DataConfig`.
        quantize: straight-through codes at these bits; None trains on the unquantised latent.
        lr: factor on the run's learning rates.
        batch_size: examples per step; None: the run's. Stages differ in what an example costs.
        hold_encoder: leave the encoder as it is, and train only what stands behind it. A first
            stage of `attention` needs this: an attachment first learns what all texts have in
            common, and an encoder that learns with it meanwhile makes all latents alike.
    """

    name: str
    steps: int
    objectives: tuple[ObjectiveConfig, ...] = field(
        default_factory=lambda: (OBJECTIVES.config("answer"),)
    )
    facts: ScheduleConfig | None = None
    quantize: int | None = None
    lr: float = 1.0
    batch_size: int | None = None
    hold_encoder: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        stage = f"stage {self.name!r}"
        require(self.steps >= 1, f"{stage}: steps={self.steps}, expected at least 1")
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
            self.quantize is None or self.quantize in BITS,
            f"{stage}: quantize={self.quantize}, expected 16, 8, 6, 4 or none",
        )
        self._check_facts()

    def _check_facts(self) -> None:
        stage = f"stage {self.name!r}"
        if self.facts is not None:
            schedule = SCHEDULES.part_of(self.facts)(self.facts)
            for facts in {schedule.value(step, self.steps) for step in range(self.steps)}:
                require(
                    facts in FACTS,
                    f"{stage}: facts={facts:g}, expected a whole number from 1 to 18",
                )

    @property
    def takes_texts(self) -> bool:
        """Whether there is something to learn from a text without questions."""
        return any(o.weight and not o.reads_answers for o in self.objectives)


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
class ContinuationConfig(Settings):
    """Paragraphs whose second half readers predict, given the first as text and as a payload.

    Attributes:
        source: as in `DataConfig`; all of it, so no training text may be in it.
        examples: how many paragraphs.
    """

    source: str
    examples: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.examples >= 2, f"examples={self.examples}, expected at least 2")


@dataclass(frozen=True)
class EvalConfig(Settings):
    """Evaluation after training.

    Attributes:
        continuation: a measure of running text beside the questions; context mode only.
    """

    batch_size: int = 50
    max_new_tokens: int = 12
    bits: tuple[int, ...] = (16, 8, 6, 4)
    timing_examples: int = 16
    resamples: int = 2000
    first_token_temperature: float = 0.0
    first_token_top_p: float = 1.0
    eos_ban_steps: int = 0
    continuation: ContinuationConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least_one("batch_size", "max_new_tokens", "timing_examples", "resamples")
        for bits in self.bits:
            require(bits in BITS, f"bits={bits}, expected 16, 8, 6 or 4")
        check_decoding(self.first_token_temperature, self.first_token_top_p, self.eos_ban_steps)


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

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.readers), "readers: at least one reader is needed (NAME=PATH)")
        for name in self.readers:
            check_reader_name(name)
        require(bool(self.stages), "stages: at least one training stage is needed")
        self.at_least_one("log_every", "save_every", "threads")
        require(
            self.minutes is None or self.minutes > 0, f"minutes={self.minutes}, expected above 0"
        )
        self._check_attachments()
        self._check_objectives()
        require(
            self.mode == "context" or self.evaluation.continuation is None,
            "evaluation.continuation needs mode='context': a text has no question to encode",
        )
        require(0 <= self.seed < 2**31, f"seed={self.seed}, expected 0 to 2,147,483,647")
        for part in (self.encoder, self.bottleneck, *self.attachments):
            part.check(self)

    def _check_attachments(self) -> None:
        require(bool(self.attachments), "attachments: at least one is needed, soft or deep")
        given = [attachment.gives for attachment in self.attachments]
        for attachment, place in zip(self.attachments, given, strict=True):
            require(
                given.count(place) == 1,
                f"attachments: {attachment.kind!r} is not the only one that makes a reader's "
                f"{place}; keep one of them",
            )

    def _check_objectives(self) -> None:
        objectives = [objective for stage in self.stages for objective in stage.objectives]
        for objective in objectives:
            require(
                self.mode in objective.modes,
                f"objective {objective.kind!r} needs mode={' or '.join(map(repr, objective.modes))}"
                f", this run has mode={self.mode!r}",
            )
            objective.check(self)
        require(
            not self.encoder.selects_positions
            or self.base is not None
            or any(objective.teaches_positions and objective.weight for objective in objectives),
            "encoder pooler 'selected' and an objective that teaches positions ('select') need "
            "each other: add it to a stage",
        )

    def gives(self, place: str) -> bool:
        """Whether an attachment makes this entry of a reader's inputs."""
        return any(attachment.gives == place for attachment in self.attachments)

    @property
    def total_steps(self) -> int:
        """Optimiser steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> tuple[StageConfig, int]:
        """The stage of a 0-based step of the run, and how many steps of it are done by then."""
        for stage in self.stages:
            if step < stage.steps:
                return stage, step
            step -= stage.steps
        return self.stages[-1], self.stages[-1].steps
