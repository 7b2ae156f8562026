"""Configurations: what is stored is what was meant, and a mistake is named."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from latentwire_fast.config.overrides import with_overrides
from latentwire_fast.config.presets import PRESETS, load_preset, weighted
from latentwire_fast.config.schema import (
    DataConfig,
    EvalConfig,
    OptimConfig,
    ReaderConfig,
    RunConfig,
    StageConfig,
)
from latentwire_fast.config.serialization import (
    config_hash,
    read_run_config,
    run_config_from_json,
    to_json,
)
from latentwire_fast.errors import CheckpointError, ConfigError
from latentwire_fast.readers.decoding import DecodeOptions
from latentwire_fast.registry import BOTTLENECKS, ENCODERS, OBJECTIVES, POOLERS, SCHEDULES
from runs import changed, deep, soft, stored

ALL = ("lm", "byte", "token_query", "sentence", "anchor_guided")


@pytest.fixture
def config() -> RunConfig:
    return PRESETS["testbed_smoke"]()


# --- JSON ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_json(name: str) -> None:
    config = load_preset(name)
    text = json.dumps(to_json(config))
    assert run_config_from_json(json.loads(text)) == config
    assert json.dumps(to_json(run_config_from_json(json.loads(text)))) == text
    assert config.preset == name


def test_what_is_left_out_is_the_default() -> None:
    data = {"readers": {"a": {"source": "x"}}, "stages": [{"name": "s", "steps": 3}]}
    config = run_config_from_json(data)
    assert config == RunConfig(
        readers={"a": ReaderConfig("x")}, stages=(StageConfig("s", steps=3),)
    )
    assert data["stages"] == [{"name": "s", "steps": 3}], "the input is not changed"


def test_the_hash_is_of_the_values(config: RunConfig) -> None:
    assert config_hash(config) == config_hash(run_config_from_json(to_json(config)))
    others = [
        changed(config, seed=1),
        changed(config, mode="pure"),
        changed(config, encoder={"latents": 5}),
        changed(config, readers={"llama": ReaderConfig("testbed:qwen")}),
        changed(config, stages=config.stages[:2]),
        changed(config, evaluation={"bits": (16, 4)}),
    ]
    hashes = {config_hash(other) for other in others} | {config_hash(config)}
    assert len(hashes) == len(others) + 1


def test_a_run_folder_gives_back_its_configuration(config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: no such file; is .* a run folder"):
        read_run_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: not valid JSON"):
        read_run_config(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"config\.json: not UTF-8 text"):
        read_run_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(to_json(config)))
    assert read_run_config(tmp_path) == config


# --- mistakes -----------------------------------------------------------------------------------


def staged_facts(*levels: tuple[float, float]) -> StageConfig:
    """A stage of two steps with this curriculum."""
    return StageConfig("s", steps=2, facts=SCHEDULES.config("steps", levels=levels))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        *((partial(ENCODERS.config, kind, latents=0), "latents=0, expected 1") for kind in ALL),
        *((partial(ENCODERS.config, kind, latents=65536), "latents=65536") for kind in ALL),
        *((partial(ENCODERS.config, kind, d_z=0), "d_z=0, expected 1 to 65535") for kind in ALL),
        (lambda: ENCODERS.config("bytes"), "no encoder 'bytes'; there are lm, byte"),
        (lambda: ENCODERS.config("byte", frozen=True), "encoder 'byte': .*'frozen'"),
        (lambda: ENCODERS.config("byte", width=30, heads=4), "width=30.*heads=4"),
        (lambda: ENCODERS.config("byte", max_bytes=0), "max_bytes=0, expected at least 1"),
        (lambda: ENCODERS.config("byte", gate="slot"), "gate='slot', expected 'shared' or 'slots'"),
        (
            lambda: ENCODERS.config("byte", pooler=POOLERS.config("queries")),
            "pooler 'queries' needs a causal LM, which encoder 'byte' does not have",
        ),
        (
            lambda: ENCODERS.config("byte", gate="slots", pooler=POOLERS.config("spans")),
            "gate='slots' is of the encoder's own pooler, and there is another, 'spans'",
        ),
        (lambda: ENCODERS.config("lm", scaffold="system"), "scaffold='system', expected 'chat' or"),
        (
            lambda: ENCODERS.config("lm", scaffold="none", template="tool_use"),
            "template='tool_use' names a chat template, and scaffold='none' takes none",
        ),
        (lambda: ENCODERS.config("lm", max_tokens=0), "max_tokens=0, expected at least 1"),
        (lambda: ENCODERS.config("lm", pooler="spans"), "pooler='spans', expected PoolerConfig"),
        (
            lambda: POOLERS.config("median"),
            "no pooler 'median'; there are queries, spans, cross_attention, layer_spans, selected",
        ),
        (lambda: POOLERS.config("queries", rehearsals=-1), "rehearsals=-1, expected at least 0"),
        (lambda: BOTTLENECKS.config("uniform", bits=5), "bits=5, expected 16, 8, 6 or 4"),
        (lambda: BOTTLENECKS.config("uniform", group_size=8), "group_size=8"),
        (lambda: soft(gain=0.0), "gain=0.0, expected above 0"),
        (lambda: soft(gain=1e30), r"gain=1e\+30, expected above 0 and at most 1000"),
        (lambda: soft(gain=math.inf), "gain=inf, expected finite float"),
        (lambda: soft(calibration="tokens"), "calibration='tokens'"),
        (lambda: soft(dropout=1.0), "dropout=1.0"),
        (lambda: soft("bilm"), "no adapter 'bilm'; there are linear, mlp"),
        (lambda: deep(dropout=1.0), "dropout=1.0"),
        (lambda: deep(width=30, heads=4), "width=30 does not divide among heads=4"),
        (lambda: ReaderConfig("x", dtype="fp32"), "dtype='fp32', expected 'float32' or"),  # type: ignore[arg-type]
        (lambda: DataConfig(facts=0), "facts=0"),
        (lambda: DataConfig(questions_per_context=0), "questions_per_context=0"),
        (lambda: DataConfig(eval_examples=0), "eval_examples=0"),
        (lambda: StageConfig("s", steps=0), "stage 's': steps=0, expected at least 1"),
        (
            lambda: StageConfig("s", steps=1, objectives=weighted(answer=0.0)),
            "stage 's': no objective with a weight above 0",
        ),
        (lambda: StageConfig("s", steps=1, objectives=()), "stage 's': no objective with a weight"),
        (
            lambda: StageConfig("s", steps=1, objectives=2 * weighted(answer=1.0)),
            "stage 's': 2 objectives 'answer', expected each once",
        ),
        (lambda: StageConfig("s", steps=1, objectives=(1.0,)), "objectives=.*, expected tuple"),  # type: ignore[arg-type]
        (lambda: weighted(kd=-1.0), "objective 'kd': weight=-1.0, expected at least 0"),
        (lambda: weighted(answers=1.0), "no objective 'answers'; there are answer, kd, "),
        (lambda: OBJECTIVES.config("kd", tau=0.0), "objective 'kd': tau=0.0, expected above 0"),
        (lambda: OBJECTIVES.config("kd", tau=math.inf), "tau=inf, expected finite"),
        (lambda: OBJECTIVES.config("kd", tokens=0), "objective 'kd': tokens=0"),
        (lambda: OBJECTIVES.config("embed", tau=1.0), "objective 'embed': .*'tau'"),
        (lambda: weighted(answer=math.nan), "weight=nan, expected finite"),
        (lambda: StageConfig("s", steps=1, lr=0.0), "stage 's': lr=0.0, expected above 0"),
        (lambda: StageConfig("s", steps=1, lr=-1.0), "stage 's': lr=-1.0"),
        (
            lambda: SCHEDULES.config("steps", levels=((math.nan, 2.0),)),
            "levels=.*nan.*, expected tuple",
        ),
        (lambda: SCHEDULES.config("steps", levels=()), "levels=.*, expected at least one"),
        (
            lambda: SCHEDULES.config("steps", levels=((0.5, 1), (0.5, 2))),
            "levels=.*: expected shares above 0 that rise to at most 1",
        ),
        (lambda: SCHEDULES.config("steps", levels=((1.5, 1),)), "rise to at most 1"),
        (lambda: SCHEDULES.config("steps", levels=((0.0, 1),)), "shares above 0"),
        (lambda: SCHEDULES.config("steps", levels=((1.0, -3.0),)), "levels of at least 0"),
        (lambda: SCHEDULES.config("constant", level=-0.5), r"level=-0\.5, expected at least 0"),
        (
            lambda: SCHEDULES.config("warmup_cosine", warmup_steps=-1),
            "warmup_steps=-1, expected at least 0",
        ),
        (lambda: SCHEDULES.config("warmup_cosine", decay_from=1.1), "decay_from=1.1, expected in"),
        (lambda: OBJECTIVES.config("answer", tokens=0), "objective 'answer': tokens=0"),
        (lambda: StageConfig("s", steps=1, quantize=0), "stage 's': quantize=0"),
        (
            lambda: changed(
                PRESETS["testbed_smoke"](), stages=(StageConfig("s", steps=1, quantize=5),)
            ),
            "stage 's': quantize=5, expected 16, 8, 6 or 4",
        ),
        (lambda: staged_facts((1.0, 19)), "stage 's': facts=19, expected a whole number from 1"),
        (lambda: staged_facts((0.5, 1), (1.0, 2.5)), "stage 's': facts=2.5, expected a whole"),
        (lambda: OptimConfig(adamw_lr=0.0), "adamw_lr=0.0, expected above 0"),
        (lambda: OptimConfig(muon_lr=-1.0), "muon_lr=-1.0, expected above 0, or none"),
        (lambda: OptimConfig(encoder_lr=math.nan), "encoder_lr=nan"),
        (lambda: OptimConfig(muon_lr=math.inf), "muon_lr=inf, expected finite float | None"),
        (lambda: OptimConfig(clip=math.inf), "clip=inf, expected finite float"),
        (lambda: OptimConfig(weight_decay=-0.1), "weight_decay=-0.1, expected at least 0"),
        (lambda: OptimConfig(lr_schedule=None), "lr_schedule=None, expected ScheduleConfig"),  # type: ignore[arg-type]
        (lambda: EvalConfig(first_token_temperature=math.nan), "first_token_temperature=nan"),
        (lambda: EvalConfig(first_token_top_p=0.0), "first_token_top_p=0.0"),
        (lambda: OptimConfig(batch_size=0), "batch_size=0"),
        (lambda: OptimConfig(micro_batch=0), "micro_batch=0"),
        (lambda: OptimConfig(clip=0.0), "clip=0.0"),
        (lambda: OptimConfig(readers="all"), "readers='all'"),  # type: ignore[arg-type]
        (lambda: OptimConfig(mixed_precision="fp16"), "mixed_precision='fp16'"),  # type: ignore[arg-type]
        (lambda: EvalConfig(bits=(16, 0)), "bits=0"),
        (
            lambda: changed(PRESETS["testbed_smoke"](), evaluation={"bits": (16, 7)}),
            "evaluation: bits=7, expected 16, 8, 6 or 4",
        ),
        (lambda: EvalConfig(batch_size=0), "batch_size=0"),
        (lambda: EvalConfig(eos_ban_steps=-3), "eos_ban_steps=-3, expected at least 0"),
        (lambda: DecodeOptions(eos_ban_steps=-3), "eos_ban_steps=-3, expected at least 0"),
    ],
)
def test_a_value_that_cannot_work_is_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"readers": {}}, "at least one reader"),
        ({"stages": ()}, "at least one training stage"),
        ({"mode": "text"}, "mode='text'.*'context'.*'pure'"),
        ({"log_every": 0}, "log_every=0"),
        ({"save_every": 0}, "save_every=0"),
        ({"threads": 0}, "threads=0"),
        ({"attachments": ()}, "attachments: at least one is needed"),
        ({"attachments": (soft(), deep(), soft())}, "'soft' is not the only one that makes"),
    ],
)
def test_a_run_that_cannot_work_is_named(config: RunConfig, change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(config, **change)


@pytest.mark.parametrize("name", ["llama-3", "Qwen2_5-7B-Instruct", "1a", "_"])
def test_a_reader_may_be_called_so(config: RunConfig, name: str) -> None:
    named = dataclasses.replace(config, readers={name: ReaderConfig("testbed:llama")})
    assert run_config_from_json(to_json(named)) == named
    assert nn.ModuleDict({name: nn.Identity()}).state_dict() == {}, "torch takes it"


# The second line's are attributes of the modules that the reader's would be kept in.
@pytest.mark.parametrize(
    "name",
    [
        *("", "llama-3.1", "a b", "-a", "a/b", "a\n", "encoder"),
        *("type", "keys", "half", "update", "values", "forward", "training", "_modules"),
    ],
)
def test_a_reader_may_not_be_called_so(config: RunConfig, name: str) -> None:
    data = to_json(config)
    data["readers"] = {name: data["readers"]["llama"]}
    with pytest.raises(ConfigError, match="reader name ") as caught:
        run_config_from_json(data)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: d.update(stepz=3), "stepz"),
        (lambda d: d["encoder"].update(latent=3), "latent"),
        (lambda d: d["stages"][0].update(loss=3), "loss"),
        (lambda d: d["stages"][0].pop("steps"), "steps"),
        (lambda d: d["readers"]["llama"].pop("source"), "source"),
        (lambda d: d["bottleneck"].update(bits=5), "bits=5, expected 16, 8, 6 or 4"),
        (lambda d: d.update(readers=[]), r"readers=\[\], expected dict"),
        (
            lambda d: d.update(readers={"llama": "path"}),
            r"readers\.llama: 'path', expected an object",
        ),
        (lambda d: d.update(stages={"a": 1}), "stages=.*, expected tuple"),
        (lambda d: d.update(stages=[7]), r"stages\[0\]: 7, expected an object"),
        (lambda d: d.update(encoder=None), "encoder: None, expected an object"),
        (lambda d: d["optim"].update(batch_size="many"), "batch_size='many', expected int"),
        (lambda d: d["optim"].update(batch_size=True), "batch_size=True, expected int"),
        (lambda d: d["attachments"][0].update(gain="1"), r"attachments\[0\]: gain='1', expected"),
        (lambda d: d["attachments"][0].update(kind="hard"), "no reader attachment 'hard'; there"),
        (lambda d: d["encoder"].pop("kind"), 'encoder: its "kind" is missing'),
        (lambda d: d["encoder"].update(kind="byte"), "encoder: does not fit this version, unknown"),
        (
            lambda d: d["encoder"]["pooler"].update(kind=3),
            r'encoder\.pooler: "kind" is 3, expected the name of a part',
        ),
        (lambda d: d["encoder"].update(kind=[]), r'encoder: "kind" is \[\], expected the name'),
        (lambda d: d.update(preset=None), "preset=None, expected str"),
        (lambda d: d["evaluation"].update(bits=16), "evaluation: bits=16, expected tuple"),
        (lambda d: d["stages"][0].update(facts=7), r"stages\[0\]\.facts: 7, expected an object"),
        (
            lambda d: d["stages"][0].update(facts={"levels": []}),
            r"stages\[0\]\.facts: its \"kind\" is missing",
        ),
        (
            lambda d: d["stages"][0].update(facts={"kind": "step"}),
            "no schedule 'step'; there are constant, warmup_cosine, steps",
        ),
        (
            lambda d: d["stages"][0].update(facts={"kind": "steps", "levels": [[1]]}),
            r"facts\.levels\[0\]: 1 values, expected 2",
        ),
        (
            lambda d: d["stages"][0].update(facts={"kind": "steps", "levels": [[1, 2.7]]}),
            r"stages\[0\]: stage 'pretrain': facts=2\.7",
        ),
        (
            lambda d: d["stages"][0].update(facts={"kind": "steps", "levels": [1]}),
            r"stages\[0\]\.facts: levels=\(1,\), expected tuple",
        ),
        (
            lambda d: d["stages"][0]["objectives"][0].update(tau=1.0),
            r"stages\[0\]\.objectives\[0\]: .* unknown tau",
        ),
        (
            lambda d: d["stages"][0]["objectives"][0].update(kind="guess"),
            r"stages\[0\]\.objectives\[0\]: no objective 'guess'; there are answer, ",
        ),
        (
            lambda d: d["stages"][0]["objectives"].append({"weight": 1.0}),
            r"stages\[0\]\.objectives\[2\]: its \"kind\" is missing",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_named(
    config: RunConfig, damage: Callable[[Any], object], message: str
) -> None:
    data = to_json(config)
    damage(data)
    with pytest.raises(ConfigError, match=message):
        run_config_from_json(data)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nobody", None, "no preset 'nobody'; presets are testbed, testbed_context"),
        ("missing.json", None, r"missing\.json"),
        ("broken.json", "{", r"broken\.json"),
        ("list.json", "[]", r"configuration: \[\], expected an object"),
        ("number.json", "7", "configuration: 7, expected an object"),
        ("latin.json", b"\xe9", r"latin\.json"),
    ],
)
def test_load_preset_names_what_is_wrong(
    tmp_path: Path, name: str, content: str | bytes | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=message) as caught:
        load_preset(str(path) if name.endswith(".json") else name)
    assert "\n" not in str(caught.value)


def test_load_preset_takes_a_file(config: RunConfig, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(to_json(changed(config, preset="mine"))))
    assert load_preset(str(path)) == stored(path)
    assert load_preset(str(path)).preset == "mine"


# --- stages -------------------------------------------------------------------------------------


def test_stage_at_walks_the_stages(config: RunConfig) -> None:
    stages = (StageConfig("a", steps=2), StageConfig("b", steps=1), StageConfig("c", steps=4))
    config = changed(config, stages=stages)
    assert config.total_steps == 7
    found = [(stage.name, done) for stage, done in map(config.stage_at, range(8))]
    assert found == [
        *(("a", 0), ("a", 1), ("b", 0)),
        *(("c", 0), ("c", 1), ("c", 2), ("c", 3)),
        ("c", 4),
    ]


# --- overrides ----------------------------------------------------------------------------------


def test_overrides_keep_what_they_do_not_name(config: RunConfig) -> None:
    assert with_overrides(config) == config
    assert with_overrides(config, seed=5) == changed(config, seed=5)
    assert with_overrides(config, seed=0) == config
    assert with_overrides(config, mode="pure") == changed(config, mode="pure")
    assert with_overrides(config, batch_size=9) == changed(config, optim={"batch_size": 9})
    assert with_overrides(config, data="a.json") == changed(config, data={"source": "a.json"})
    found = with_overrides(config, eval_examples=3)
    assert found == changed(config, data={"eval_examples": 3})


def test_embeddings_of_answers_are_for_latents_that_may_hold_one(config: RunConfig) -> None:
    align = StageConfig("align", steps=1, objectives=weighted(embed=1.0))
    stages = (align, *config.stages)
    pure = changed(config, mode="pure", stages=stages)
    with pytest.raises(ConfigError, match="'embed' needs mode='pure', this run has mode='context'"):
        changed(pure, mode="context")
    with pytest.raises(ConfigError, match="'embed' needs an attachment 'soft'"):
        changed(pure, attachments=(deep(),))
    assert with_overrides(pure, mode="context") == changed(pure, mode="context", stages=stages[1:])
    assert with_overrides(pure, mode="pure") == pure
    assert with_overrides(pure, mode="context", steps=40).total_steps == 40
    both = (replace(align, objectives=weighted(embed=1.0, answer=0.5)), *config.stages)
    found = with_overrides(changed(pure, stages=both), mode="context")
    assert found.stages[0] == replace(align, objectives=weighted(answer=0.5))


@pytest.mark.parametrize("given", [{"data": ""}, {"encoder": ""}, {"readers": {"a": ""}}])
def test_an_empty_source_is_not_taken_for_none(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="is given as nothing; leave it out"):
        with_overrides(load_preset("testbed"), **given)


def test_threads_of_the_testbed_are_for_its_small_readers() -> None:
    config = load_preset("testbed_smoke")
    assert config.threads == 1
    assert with_overrides(config, readers={"one": "testbed:qwen"}).threads == 1
    assert with_overrides(config, readers={"one": "testbed:qwen", "two": "LM"}).threads is None


def test_override_of_readers_brings_the_encoder_along(config: RunConfig) -> None:
    found = with_overrides(config, readers={"a": "x", "b": "y"})
    assert found.readers == {"a": ReaderConfig("x"), "b": ReaderConfig("y")}
    assert found.encoder.source == "x"
    found = with_overrides(config, readers={"a": "x"}, encoder="z")
    assert found.encoder.source == "z"
    assert with_overrides(config, encoder="z").readers == config.readers


@pytest.mark.parametrize(
    ("steps", "expected"), [(12, [4, 4, 4]), (40, [13, 14, 13]), (3, [1, 1, 1]), (1, [1, 1, 1])]
)
def test_override_of_steps_cuts_every_stage(
    config: RunConfig, steps: int, expected: list[int]
) -> None:
    found = with_overrides(config, steps=steps)
    assert [stage.steps for stage in found.stages] == expected
    assert [stage.name for stage in found.stages] == [stage.name for stage in config.stages]


@pytest.mark.parametrize("name", ["steps", "batch_size", "eval_examples"])
@pytest.mark.parametrize("value", [0, -3])
def test_overrides_below_one_are_refused(config: RunConfig, name: str, value: int) -> None:
    with pytest.raises(ConfigError, match=rf"{name}={value}"):
        with_overrides(config, **{name: value})  # type: ignore[arg-type]


def test_a_run_folder_of_another_version_is_named_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"adapter": {"prefix": "soft"}}')
    with pytest.raises(ConfigError, match=r"config\.json: .*unknown adapter; if another version"):
        read_run_config(tmp_path)
