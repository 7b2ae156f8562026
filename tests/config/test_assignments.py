"""`PATH=VALUE`: every field can be set, and what cannot be says so with the nearest names."""

from __future__ import annotations

import json
from typing import Any

import pytest

from latentwire_fast.config.assignments import with_assignments
from latentwire_fast.config.presets import PRESETS
from latentwire_fast.config.schema import ReaderConfig, RunConfig
from latentwire_fast.config.serialization import to_json
from latentwire_fast.errors import ConfigError


@pytest.fixture
def config() -> RunConfig:
    return PRESETS["testbed_context"]()


def at(config: RunConfig, *steps: str | int) -> Any:
    value = to_json(config)
    for step in steps:
        value = value[step]
    return value


@pytest.mark.parametrize(
    ("assignment", "steps", "value"),
    [
        ("seed=7", ("seed",), 7),
        ("readers.llama.load_in_4bit=true", ("readers", "llama", "load_in_4bit"), True),
        ("readers.llama.dtype=bfloat16", ("readers", "llama", "dtype"), "bfloat16"),
        ("readers.llama.source=a=b", ("readers", "llama", "source"), "a=b"),
        ('readers.llama.source="7"', ("readers", "llama", "source"), "7"),
        ("stages.2.steps=10", ("stages", 2, "steps"), 10),
        ("stages.match.lr=2", ("stages", 2, "lr"), 2),
        ("stages.select.objectives.kv.weight=0.5", ("stages", 0, "objectives", 1, "weight"), 0.5),
        ("stages.quantized.quantize=null", ("stages", 4, "quantize"), None),
        ("optim.lr_schedule.warmup_steps=3", ("optim", "lr_schedule", "warmup_steps"), 3),
        ("attachments.deep.width=64", ("attachments", 0, "width"), 64),
        ("evaluation.bits=[6,4]", ("evaluation", "bits"), [6, 4]),
        ("bottleneck.bits=8", ("bottleneck", "bits"), 8),
    ],
)
def test_a_field_is_set_and_no_other(
    config: RunConfig, assignment: str, steps: tuple[str | int, ...], value: object
) -> None:
    changed = with_assignments(config, [assignment])
    assert at(changed, *steps) == value
    before, after = to_json(config), to_json(changed)
    for data in (before, after):
        place = data
        for step in steps[:-1]:
            place = place[step]
        place[steps[-1]] = None
    assert before == after


def test_what_only_holds_together_is_set_together(config: RunConfig) -> None:
    changed = with_assignments(
        config,
        [
            "encoder.pooler.kind=spans",
            'stages=[{"name": "answer", "steps": 5}]',
            "stages.answer.steps=6",
        ],
    )
    assert at(changed, "encoder", "pooler", "kind") == "spans"
    assert [stage.steps for stage in changed.stages] == [6]
    with pytest.raises(ConfigError, match=r"with 'encoder\.pooler\.kind=spans': .*select"):
        with_assignments(config, ["encoder.pooler.kind=spans"])


def test_another_kind_keeps_the_settings_that_both_have() -> None:
    config = PRESETS["testbed"]()
    options = ["encoder.latents=5", "encoder.kind=byte", "encoder.width=32"]
    changed = with_assignments(config, options)
    encoder = at(changed, "encoder")
    assert (encoder["kind"], encoder["latents"], encoder["width"]) == ("byte", 5, 32)
    assert encoder["pooler"] is None, "the other encoder's pooler is not kept"
    same = with_assignments(config, ["encoder.kind=lm"])
    assert same == config
    token_query = at(with_assignments(config, ["encoder.kind=token_query"]), "encoder")
    assert token_query["pooler"]["kind"] == "gated_queries"


def test_another_kind_begins_with_its_own_defaults() -> None:
    options = ["attachments.soft.gain=2", "attachments.soft.kind=soft_matched"]
    matched = at(with_assignments(PRESETS["testbed_smoke"](), options), "attachments", 0)
    assert (matched["calibration"], matched["gain"]) == ("none", 2.0)


def test_entries_with_dots_in_their_names_are_added_and_changed(config: RunConfig) -> None:
    schedule = '={"kind": "linear", "start": 1, "end": 0}'
    changed = with_assignments(
        config,
        [
            f"stages.quantized.schedules.answer.weight{schedule}",
            "stages.quantized.schedules.answer.weight.end=0.5",
            "warm_start.attachments.llama=runs/a",
            "warm_start.encoder=runs/b",
        ],
    )
    assert at(changed, "stages", 4, "schedules", "answer.weight", "end") == 0.5
    assert changed.warm_start == {"attachments.llama": "runs/a", "encoder": "runs/b"}


def test_a_later_one_wins_and_nothing_changes_nothing(config: RunConfig) -> None:
    assert with_assignments(config, ["seed=1", "seed=2"]).seed == 2
    assert with_assignments(config) is config


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("seed", "expected PATH=VALUE"),
        ("=3", "expected PATH=VALUE"),
        ("sed=3", "there is no 'sed'; did you mean seed"),
        ("optim.adam_lr=3", "did you mean adamw_lr"),
        ("readers.lama.dtype=float16", "did you mean llama"),
        ("readers.llama.load_4bit=true", "did you mean load_in_4bit"),
        ("encoder.pooler.kind=span", "did you mean spans"),
        ("encoder.poler.kind=spans", "did you mean pooler"),
        ("stages.9.steps=3", r"no entry '9'; there are 0 \(select\), 1 \(sharpen\)"),
        ("stages.anwser.steps=3", "no entry 'anwser'"),
        ("seed.x=3", "nothing within it"),
        ("encoder.kind.x=3", "'kind' has no fields"),
        ("seed=true", "seed=True, expected int"),
        ("readers.llama.dtype=half", "'half', expected 'float32' or 'bfloat16'"),
        ("readers.llama.source=7", "source=7, expected str"),
        ("stages=3", "stages"),
        (".seed=3", "there is no ''"),
        ("xyz=3", "there is no 'xyz'; there are preset"),
        ("readers.x={}", "there is no 'x'; there are llama, qwen"),
        ("stages.quantized.schedules.gian=1", "schedules"),
        ("stages.quantized.schedules.gain.end=1", "schedules"),
    ],
)
def test_what_cannot_be_set_says_why(config: RunConfig, assignment: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_assignments(config, [assignment])


def test_reader_options_are_short_for_a_readers_fields(config: RunConfig) -> None:
    changed = with_assignments(
        config, reader_options=["llama.dtype=bfloat16", "qwen.attn_implementation=eager"]
    )
    assert changed.readers == {
        "llama": ReaderConfig("testbed:llama", dtype="bfloat16"),
        "qwen": ReaderConfig("testbed:qwen", attn_implementation="eager"),
    }
    with pytest.raises(ConfigError, match=r"--reader-options 'dtype=x': expected NAME\.FIELD"):
        with_assignments(config, reader_options=["dtype=x"])
    with pytest.raises(ConfigError, match="did you mean qwen"):
        with_assignments(config, reader_options=["qwn.dtype=float16"])


def test_of_a_trained_run_only_the_reading_can_be_set(config: RunConfig) -> None:
    changed = with_assignments(
        config,
        ["evaluation.batch_size=8"],
        reader_options=["llama.dtype=bfloat16", "llama.attn_implementation=eager"],
        trained=True,
    )
    assert changed.evaluation.batch_size == 8
    llama = changed.readers["llama"]  # known by the weights that it was trained with
    assert (llama.dtype, llama.compute_dtype) == ("float32", "bfloat16")
    for text in ("encoder.latents=3", "seed=3", "readers.llama.source=x"):
        with pytest.raises(ConfigError, match=r"fixed when a run is trained; .*readers and eval"):
            with_assignments(config, [text], trained=True)


def test_every_field_of_every_preset_can_be_named() -> None:
    """Each leaf of the JSON form, set to what it is: nothing changes."""
    for name in PRESETS:
        config = PRESETS[name]()
        texts = list(_leaves(to_json(config)))
        assert len(texts) > 50
        assert with_assignments(config, texts) == config


def _leaves(value: Any, path: str = "") -> Any:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for i, item in enumerate(value):
            yield from _leaves(item, f"{path}.{i}")
    else:
        yield f"{path}={json.dumps(value)}"


@pytest.mark.parametrize(
    ("assignment", "example"),
    [
        ("encoder.pooler.kind=spans", 'encoder.pooler={"kind": "spans"}'),
        ("evaluation.continuation.examples=5", 'evaluation.continuation={"examples": 5}'),
    ],
)
def test_what_is_null_is_set_as_a_whole(assignment: str, example: str) -> None:
    config = with_assignments(
        PRESETS["testbed_byte"](), ["mode=context", "stages.align.objectives.embed.kind=answer"]
    )
    with pytest.raises(ConfigError) as caught:
        with_assignments(config, [assignment])
    assert f"is null; set it as a whole, such as {example}" in str(caught.value)
    if "pooler" in example:
        assert with_assignments(config, [example]) != config
