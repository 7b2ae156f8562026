"""Named configurations: functions that return a `RunConfig`.

python -m latentwire_fast.train testbed             # pure mode, minutes on two CPU cores
python -m latentwire_fast.train testbed_context     # the compression claim
python -m latentwire_fast.train testbed --print-config > mine.json
python -m latentwire_fast.train mine.json
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from latentwire_fast.config.schema import (
    DataConfig,
    EvalConfig,
    ObjectiveConfig,
    OptimConfig,
    ReaderConfig,
    RunConfig,
    StageConfig,
)
from latentwire_fast.config.serialization import run_config_from_json
from latentwire_fast.errors import ConfigError
from latentwire_fast.files.json_files import read_json
from latentwire_fast.registry import (
    ADAPTERS,
    ATTACHMENTS,
    ENCODERS,
    OBJECTIVES,
    POOLERS,
    SCHEDULES,
)

# More threads wait for one another, and spin while they do. Milliseconds of a step of `testbed` on
# two cores, alone and beside one busy process: one thread 688 and 784, two 596 and 1,696, two that
# sleep while they wait 974 and 1,660. And one thread gives the same losses on any number of cores.
TESTBED_THREADS = 1

TESTBED_READERS = {
    "llama": ReaderConfig("testbed:llama"),
    "qwen": ReaderConfig("testbed:qwen"),
}


def weighted(**weights: float) -> tuple[ObjectiveConfig, ...]:
    """Objectives by name with their weights, for `StageConfig.objectives`."""
    return tuple(OBJECTIVES.config(kind, weight=weight) for kind, weight in weights.items())


def testbed() -> RunConfig:
    """Pure mode on the testbed: the latent stands for the whole prompt, question included.

    Two rehearsals, because an answer has at most two tokens before its EOS; a slow encoder, because
    it can do the task from the start and only has to make itself understood. The soft tokens begin
    as the reader's own words for that: cross-entropy alone teaches first tokens, and may never
    teach the second ones.
    """
    return RunConfig(
        preset="testbed",
        threads=TESTBED_THREADS,
        mode="pure",
        readers=TESTBED_READERS,
        encoder=ENCODERS.config("lm", pooler=POOLERS.config("queries", rehearsals=2)),
        attachments=(ATTACHMENTS.config("soft", adapter=ADAPTERS.config("mlp", expansion=8)),),
        stages=(
            StageConfig("align", steps=80, objectives=weighted(embed=1.0)),
            StageConfig("answer", steps=120, lr=0.5),
            StageConfig("quantized", steps=500, lr=0.5, quantize=6),
        ),
        optim=OptimConfig(
            batch_size=32,
            muon_lr=0.02,
            adamw_lr=3e-3,
            encoder_lr=0.1,
            lr_schedule=SCHEDULES.config("warmup_cosine", warmup_steps=20, decay_from=0.25),
        ),
    )


def testbed_context() -> RunConfig:
    """Context-only mode on the testbed: the latent holds every fact, the question comes as text.

    The latents stand at the positions of the text that answers look at, and deep prefixes learn the
    reader's own keys and values there before any answer is asked for
    (`models/poolers/selected.py`, `readers/trace.py`). The encoder's LM is frozen, so the positions
    stay as they were learned; `sharpen` averages the noise of their scores out. Eight positions
    are enough: with the reader's own keys and values at more of them it answers no better
    (`bench/chosen_positions.py`). Answers come last and slowly, beside the keys and values: they
    undo these at a high learning rate. Three of four passages hold two kinds of facts only: facts
    of one kind are what is told apart last.
    """
    kv_and_answers = weighted(answer=1.0, kv=0.3)
    return RunConfig(
        preset="testbed_context",
        threads=TESTBED_THREADS,
        mode="context",
        readers=TESTBED_READERS,
        encoder=ENCODERS.config(
            "lm", latents=8, d_z=24, pooler=POOLERS.config("selected"), frozen=True
        ),
        attachments=(ATTACHMENTS.config("deep"),),
        data=DataConfig(similar=0.75),
        stages=(
            StageConfig("select", steps=80, objectives=weighted(select=1.0, kv=1.0)),
            StageConfig("sharpen", steps=60, lr=0.2, objectives=weighted(select=1.0, kv=1.0)),
            StageConfig("match", steps=1200, objectives=weighted(kv=1.0)),
            StageConfig("settle", steps=300, lr=0.3, objectives=weighted(kv=1.0)),
            StageConfig("quantized", steps=900, lr=0.2, quantize=6, objectives=kv_and_answers),
        ),
        optim=OptimConfig(
            batch_size=24,
            muon_lr=0.02,
            adamw_lr=3e-3,
            lr_schedule=SCHEDULES.config("warmup_cosine", warmup_steps=20, decay_from=0.66),
        ),
    )


def testbed_quick() -> RunConfig:
    """`testbed_context` with one reader and passages of two facts: a payload is answered from after
    two minutes on one core. It shows how things are used and proves nothing: texts as short as
    these are shorter than their payloads."""
    base = testbed_context()
    steps = {"select": 30, "sharpen": 10, "match": 110, "settle": 30, "quantized": 60}
    return replace(
        base,
        preset="testbed_quick",
        readers={"llama": TESTBED_READERS["llama"]},
        data=replace(base.data, facts=2),
        stages=tuple(replace(stage, steps=steps[stage.name]) for stage in base.stages),
    )


def testbed_byte() -> RunConfig:
    """The pure-mode run with the byte encoder in the place of the LM: the same budget, for
    comparison."""
    base = testbed()
    return replace(base, preset="testbed_byte", encoder=ENCODERS.config("byte"))


def testbed_smoke() -> RunConfig:
    """A few steps of everything (both pretraining tasks, KD, quantisation): does it run at all?"""
    return RunConfig(
        preset="testbed_smoke",
        threads=TESTBED_THREADS,
        readers=TESTBED_READERS,
        encoder=ENCODERS.config("lm", latents=4, d_z=8, pooler=POOLERS.config("spans")),
        attachments=(ATTACHMENTS.config("soft", adapter=ADAPTERS.config("linear")),),
        data=DataConfig(facts=2, eval_examples=8),
        stages=(
            StageConfig("pretrain", steps=2, objectives=weighted(autoencode=0.2, continuation=0.8)),
            StageConfig("answer", steps=2, objectives=weighted(answer=1.0, kd=0.5)),
            StageConfig(
                "quantized",
                steps=2,
                objectives=(OBJECTIVES.config("answer", tokens=2),),
                quantize=6,
            ),
        ),
        optim=OptimConfig(
            batch_size=4,
            micro_batch=2,
            lr_schedule=SCHEDULES.config("warmup_cosine", warmup_steps=2),
        ),
        log_every=1,
        save_every=2,
    )


def squad_small() -> RunConfig:
    """Context mode on real text: two small pretrained readers of different families read passages
    of SQuAD. `make real` runs it, on two cores in an hour or on a GPU.

    The encoder's LM is SmolLM2 itself, frozen: its states, and what the readers' attention gets
    from a text, are computed once and kept. Selecting positions, which wins on the testbed, is
    worse than chance on real text (docs/results.md).
    """
    return RunConfig(
        preset="squad_small",
        mode="context",
        readers={
            "smollm2": ReaderConfig("package:smollm2", compute_dtype="auto"),
            "gemma3": ReaderConfig("package:gemma3", compute_dtype="auto"),
        },
        encoder=ENCODERS.config(
            "lm",
            source="package:smollm2",
            latents=32,
            d_z=32,
            pooler=POOLERS.config("layer_spans"),
            frozen=True,
            max_tokens=320,
        ),
        attachments=(ATTACHMENTS.config("deep", in_place=True, width=384, expansion=2),),
        # All questions on a context together: what is kept of it is computed once.
        data=DataConfig(
            source="hub:squad",
            max_context_tokens=300,
            text_share=0.5,
            questions_per_context=8,
            eval_examples=200,
        ),
        stages=_attention_recipe(held=100, match=3000, answer=500, quantized=200, batch_size=3),
        optim=OptimConfig(
            muon_lr=None,
            adamw_lr=1e-3,
            weight_decay=0.01,
            lr_schedule=SCHEDULES.config("warmup_cosine", warmup_steps=30, decay_from=0.5),
            batch_size=16,
            mixed_precision="bf16",
        ),
        evaluation=EvalConfig(batch_size=16, max_new_tokens=16, timing_examples=8, bits=(16, 6, 4)),
        log_every=20,
        save_every=250,
    )


def squad_llama_qwen() -> RunConfig:
    """Context mode at full size: Llama-3.1-8B and Qwen2.5-7B read passages of SQuAD, which a
    Llama-3.2-1B has put into 32 latents. The recipe is that of `squad_small`. For GPUs; not run
    here."""
    return RunConfig(
        preset="squad_llama_qwen",
        mode="context",
        readers={
            "llama": ReaderConfig("meta-llama/Llama-3.1-8B-Instruct", dtype="bfloat16"),
            "qwen": ReaderConfig("Qwen/Qwen2.5-7B-Instruct", dtype="bfloat16"),
        },
        encoder=ENCODERS.config(
            "lm",
            source="meta-llama/Llama-3.2-1B",
            latents=32,
            d_z=256,
            pooler=POOLERS.config("layer_spans"),
            frozen=True,
        ),
        attachments=(ATTACHMENTS.config("deep", in_place=True, width=512, expansion=2),),
        data=DataConfig(source="hub:squad", eval_examples=1000),
        stages=_attention_recipe(held=400, match=7600, answer=12000, quantized=4000, kd=0.5),
        optim=OptimConfig(
            muon_lr=None,
            adamw_lr=1e-4,
            lr_schedule=SCHEDULES.config("warmup_cosine", warmup_steps=500, decay_from=0.05),
            batch_size=64,
            micro_batch=8,
            mixed_precision="bf16",
            gradient_checkpointing=True,
        ),
        evaluation=EvalConfig(batch_size=32, max_new_tokens=16, timing_examples=64),
        log_every=20,
        save_every=500,
    )


def _attention_recipe(
    *,
    held: int,
    match: int,
    answer: int,
    quantized: int,
    batch_size: int | None = None,
    kd: float = 0.0,
) -> tuple[StageConfig, ...]:
    """What holds on real text: a deep prefix learns what attention gets from the whole text, first
    from an encoder that stays as it is; then the answers too, then both at the width that is sent.

    Answers alone teach the form of an answer and not the text: the payload of another example is
    then worth as much, from the start and after `match` alike.

    Args:
        held, match, answer, quantized: steps.
        batch_size: of the stages that read answers: those go backward through the readers.
        kd: weight of distillation in them; 0 leaves it out.
    """
    answers: dict[str, Any] = {
        "lr": 0.5,
        "batch_size": batch_size,
        "objectives": weighted(answer=1.0, attention=0.5, **({"kd": kd} if kd else {})),
    }
    attention = weighted(attention=1.0)
    return (
        StageConfig("held", steps=held, objectives=attention, hold_encoder=True),
        StageConfig("match", steps=match, objectives=attention),
        StageConfig("answer", steps=answer, **answers),
        StageConfig("quantized", steps=quantized, quantize=6, **answers),
    )


def squad_small_smoke() -> RunConfig:
    """The parts of `squad_small` on the testbed, two steps of each stage: does it run at all?"""
    return _smoke(squad_small())


def squad_llama_qwen_smoke() -> RunConfig:
    """The parts of `squad_llama_qwen` on the testbed, two steps of each stage."""
    return _smoke(squad_llama_qwen())


def _smoke(config: RunConfig) -> RunConfig:
    """A run with the testbed's readers and texts and with small numbers, and the same parts."""
    small: dict[str, Any] = {"latents": 4, "d_z": 8}
    narrow: dict[str, Any] = {"width": 32, "layers": 1, "heads": 2}
    return replace(
        config,
        preset=f"{config.preset}_smoke",
        threads=TESTBED_THREADS,
        readers=TESTBED_READERS,
        encoder=replace(config.encoder.with_source("testbed:llama"), **small),
        attachments=tuple(replace(attachment, **narrow) for attachment in config.attachments),
        data=DataConfig(facts=2, eval_examples=8),
        stages=tuple(replace(stage, steps=2, batch_size=None) for stage in config.stages),
        optim=replace(
            config.optim,
            batch_size=4,
            micro_batch=2,
            mixed_precision="no",
            lr_schedule=SCHEDULES.config("warmup_cosine", warmup_steps=2),
        ),
        evaluation=EvalConfig(batch_size=8, bits=(6,), timing_examples=1, resamples=100),
        log_every=1,
        save_every=2,
    )


PRESETS: dict[str, Callable[[], RunConfig]] = {
    function.__name__: function
    for function in (
        testbed,
        testbed_context,
        testbed_quick,
        testbed_byte,
        testbed_smoke,
        squad_small,
        squad_llama_qwen,
        squad_small_smoke,
        squad_llama_qwen_smoke,
    )
}


def load_preset(name: str) -> RunConfig:
    """A preset by name, or a configuration from a JSON file.

    Raises:
        ConfigError: neither a preset nor a readable configuration file.
    """
    if name in PRESETS:
        return PRESETS[name]()
    path = Path(name)
    if path.suffix != ".json":
        raise ConfigError(f"no preset {name!r}; presets are {', '.join(PRESETS)}, or give a .json")
    return run_config_from_json(read_json(path, error=ConfigError))
