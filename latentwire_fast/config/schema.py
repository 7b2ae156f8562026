"""The whole configuration of a run as frozen dataclasses. Presets are functions in `presets.py`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from latentwire_fast.config.base import Settings, require

Mode = Literal["context", "pure"]
Calibration = Literal["none", "token", "example", "batch"]
BITS = (16, 8, 6, 4)
OBJECTIVES = ("answer", "autoencode", "continuation", "select", "kv", "embed", "kd")  # of a stage


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


# A reader's name is the key of its modules in these, and stands beside "encoder" in diagnostics.
_RESERVED = {"encoder", *dir(nn.ModuleDict()), *dir(nn.ParameterDict())}


def check_reader_name(name: str) -> None:
    """Raise unless a reader can be called so.

    Raises:
        ConfigError: something but letters, digits, _ and -, or a name that has a meaning already.
    """
    require(
        re.fullmatch(r"\w[\w-]*", name) is not None,
        f"reader name {name!r}: give it one of letters, digits, _ and - that does not begin with -",
    )
    require(name not in _RESERVED, f"reader name {name!r} is taken; give the reader another")


@dataclass(frozen=True)
class ReaderConfig(Settings):
    """One frozen LLM. `source` is `testbed:NAME`, a local folder or a hub id."""

    source: str
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attn_implementation: str = "sdpa"
    device_map: str | None = None
    load_in_4bit: bool = False
    bos: bool | None = None


@dataclass(frozen=True)
class EncoderConfig(Settings):
    """Text to latent.

    Attributes:
        kind: `lm` starts from a pretrained causal LM; `byte` from nothing, on UTF-8 bytes.
        source: the LM: a reader's source (its own weights are copied), a folder or a hub id.
        latents, d_z: the latent is `[latents, d_z]`.
        pooling: `queries` are learned tokens after the text; `spans` averages the hidden states of
            contiguous spans; `selected` takes the positions of the text that answers will look at
            (a stage with `select` teaches it which).
        rehearsals: passes in which the queries first take in what the LM would say next.
        frozen: keep the LM's weights and train only what was added.
        byte_*: the byte encoder's width, layers, heads and longest input.
    """

    kind: Literal["lm", "byte"] = "lm"
    source: str = "testbed:llama"
    latents: int = 12
    d_z: int = 16
    pooling: Literal["queries", "spans", "selected"] = "queries"
    rehearsals: int = 0
    frozen: bool = False
    max_tokens: int = 1024
    gradient_checkpointing: bool = False
    byte_width: int = 128
    byte_layers: int = 2
    byte_heads: int = 4
    byte_max: int = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        require(1 <= self.latents <= 65535, f"latents={self.latents}, expected 1 to 65535")
        require(1 <= self.d_z <= 65535, f"d_z={self.d_z}, expected 1 to 65535")
        require(self.rehearsals >= 0, f"rehearsals={self.rehearsals}, expected at least 0")
        self.at_least_one("max_tokens", "byte_width", "byte_layers", "byte_heads", "byte_max")
        require(
            self.byte_width % self.byte_heads == 0,
            f"byte_width={self.byte_width} does not divide among byte_heads={self.byte_heads}",
        )


@dataclass(frozen=True)
class QuantizerConfig(Settings):
    """The wire's precision: 16 sends fp16 values, 8/6/4 codes with fp16 group scales."""

    bits: int = 6
    group_size: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.bits in BITS, f"bits={self.bits}, expected 16, 8, 6 or 4")
        require(self.group_size in (16, 32, 64), f"group_size={self.group_size}: 16, 32 or 64")


@dataclass(frozen=True)
class AdapterConfig(Settings):
    """Latent to what one reader takes in.

    Attributes:
        prefix: `soft` makes input embeddings, `deep` keys and values for every layer of the
            reader's cache, `both` gives it both (at twice the positions).
        kind: `linear` is LayerNorm + Linear; `mlp` a residual 2-layer MLP at the reader's width
            first.
        calibration: rescale to the reader's embedding RMS per token, per example or batch, or not.
        gain: factor on that RMS. tanh: squash the projection (the seeds' adapter).
        expansion, dropout: of the MLPs.
        deep_width, deep_layers, deep_heads: the transformer that generates a deep prefix.
        deep_calibration: rescale a deep prefix's keys and values, of each layer by themselves, to
            the learned gains (which start at the RMS of the reader's own), or only multiply by
            them.
    """

    prefix: Literal["soft", "deep", "both"] = "soft"
    kind: Literal["linear", "mlp"] = "mlp"
    calibration: Calibration = "token"
    gain: float = 1.0
    tanh: bool = False
    expansion: int = 4
    dropout: float = 0.0
    deep_width: int = 256
    deep_layers: int = 2
    deep_heads: int = 8
    deep_calibration: Calibration = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.gain > 0, f"gain={self.gain}, expected above 0")
        require(0 <= self.dropout < 1, f"dropout={self.dropout}, expected in [0, 1)")
        self.at_least_one("expansion", "deep_width", "deep_layers", "deep_heads")
        require(
            self.deep_width % self.deep_heads == 0,
            f"deep_width={self.deep_width} does not divide among deep_heads={self.deep_heads}",
        )


@dataclass(frozen=True)
class DataConfig(Settings):
    """Where examples come from.

    Attributes:
        source: `testbed`, a SQuAD-format file, a saved `datasets` folder, `NAME=PATH` (rows of the
            set NAME), `hub:NAME`, or several of these with commas between them, in equal shares.
        facts: testbed: facts per passage at the end of the curriculum.
        similar: testbed: share of training passages with only two kinds of facts, which have to
            be told apart.
        questions_per_context: context mode asks several questions of one latent per step.
        eval_examples, eval_seed: size and seed of the held-out set.
    """

    source: str = "testbed"
    facts: int = 4
    similar: float = 0.0
    questions_per_context: int = 4
    eval_examples: int = 500
    eval_seed: int = 99

    def __post_init__(self) -> None:
        super().__post_init__()
        require(1 <= self.facts <= 18, f"facts={self.facts}, expected 1 to 18")
        require(0 <= self.similar <= 1, f"similar={self.similar}, expected 0 to 1")
        self.at_least_one("questions_per_context", "eval_examples")


@dataclass(frozen=True)
class StageConfig(Settings):
    """One training stage. Objective weights of 0 switch an objective off.

    Attributes:
        steps: optimiser steps.
        answer: weight of the answer cross-entropy, over `answer_tokens` tokens (None: all and EOS).
        autoencode, continuation: weights of rebuilding the context, and of going on from its half.
        select: weight of scoring the text's positions as the readers' answers attend to them
            (cross-entropy; encoder with pooling `selected`).
        kv: weight of a deep prefix's squared distance, relative to its size, to the keys and values
            that the reader itself holds at those positions.
        embed: weight of the first soft tokens' squared distance, relative to its size, to the
            reader's own embeddings of the answer and its EOS (pure mode).
        kd, kd_tau: weight and temperature of distillation from the text-prompted teacher.
        facts: testbed curriculum, `((until_share, facts), ...)`.
        quantize: straight-through codes at these bits; None trains on the unquantised latent.
        lr: factor on the run's learning rates.
    """

    name: str
    steps: int
    answer: float = 1.0
    answer_tokens: int | None = None
    autoencode: float = 0.0
    continuation: float = 0.0
    select: float = 0.0
    kv: float = 0.0
    embed: float = 0.0
    kd: float = 0.0
    kd_tau: float = 1.0
    facts: tuple[tuple[float, int], ...] = ()
    quantize: int | None = None
    lr: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.steps >= 1, f"stage {self.name!r}: steps={self.steps}, expected at least 1")
        weights = tuple(getattr(self, name) for name in OBJECTIVES)
        require(
            min(weights) >= 0 and max(weights) > 0,
            f"stage {self.name!r}: objective weights {weights}, expected >= 0 and one above 0",
        )
        for name in ("kd_tau", "lr"):
            value = getattr(self, name)
            require(value > 0, f"stage {self.name!r}: {name}={value}, expected above 0")
        require(
            self.answer_tokens is None or self.answer_tokens >= 1,
            f"stage {self.name!r}: answer_tokens={self.answer_tokens}, expected at least 1",
        )
        require(
            self.quantize is None or self.quantize in BITS,
            f"stage {self.name!r}: quantize={self.quantize}, expected 16, 8, 6, 4 or none",
        )
        for _, facts in self.facts:
            require(1 <= facts <= 18, f"stage {self.name!r}: facts={facts}, expected 1 to 18")


@dataclass(frozen=True)
class OptimConfig(Settings):
    """Optimiser and schedule: linear warm-up, flat, then cosine to zero from `decay_from` on.

    Attributes:
        encoder_lr: factor on both learning rates for the encoder's pretrained LM.
    """

    muon_lr: float | None = 0.01
    encoder_lr: float = 1.0
    adamw_lr: float = 2e-3
    weight_decay: float = 0.0
    warmup_steps: int = 100
    decay_from: float = 0.3
    clip: float = 1.0
    batch_size: int = 24
    micro_batch: int | None = None
    readers: Literal["sum", "alternate"] = "sum"
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
        for name in ("weight_decay", "warmup_steps"):
            value = getattr(self, name)
            require(value >= 0, f"{name}={value}, expected at least 0")
        require(0 <= self.decay_from <= 1, f"decay_from={self.decay_from}, expected in [0, 1]")


@dataclass(frozen=True)
class EvalConfig(Settings):
    """Evaluation after training."""

    batch_size: int = 50
    max_new_tokens: int = 12
    bits: tuple[int, ...] = (16, 8, 6, 4)
    timing_examples: int = 16
    resamples: int = 2000
    first_token_temperature: float = 0.0
    first_token_top_p: float = 1.0
    eos_ban_steps: int = 0

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
            quantiser: this run's readers learn to read the payloads that are out there.
        threads: of torch on a CPU; None leaves them to torch.
        log_every, save_every: steps between diagnostics and between checkpoints.
    """

    preset: str = "custom"
    base: str | None = None
    mode: Mode = "context"
    seed: int = 0
    threads: int | None = None
    readers: dict[str, ReaderConfig] = field(default_factory=dict)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    stages: tuple[StageConfig, ...] = ()
    optim: OptimConfig = field(default_factory=OptimConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    log_every: int = 10
    save_every: int = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.readers), "readers: at least one reader is needed (NAME=PATH)")
        for name in self.readers:
            check_reader_name(name)
        require(bool(self.stages), "stages: at least one training stage is needed")
        self.at_least_one("log_every", "save_every", "threads")
        selects = self.encoder.kind == "lm" and self.encoder.pooling == "selected"
        learns = any(stage.select for stage in self.stages)
        require(
            learns == (selects and self.base is None),
            "encoder pooling='selected' and a stage with select > 0 need each other: the positions "
            "are learned there"
            if self.base is None
            else f"a stage has select > 0: the encoder of {self.base} keeps its positions",
        )
        require(
            not any(stage.kv for stage in self.stages)
            or (selects and self.adapter.prefix != "soft"),
            "a stage with kv > 0 needs encoder pooling='selected' and adapter prefix='deep' or "
            "'both'",
        )
        require(
            not any(stage.embed for stage in self.stages)
            or (self.mode == "pure" and self.adapter.prefix != "deep"),
            "a stage with embed > 0 needs mode='pure', where a latent may hold an answer, and "
            "adapter prefix='soft' or 'both'",
        )
        require(0 <= self.seed < 2**31, f"seed={self.seed}, expected 0 to 2,147,483,647")

    @property
    def total_steps(self) -> int:
        """Optimiser steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> tuple[StageConfig, float]:
        """The stage of a 0-based step, and the share of that stage already done."""
        for stage in self.stages:
            if step < stage.steps:
                return stage, step / stage.steps
            step -= stage.steps
        return self.stages[-1], 1.0
