"""Sweeps as files: what they stand for, and what a mistake in one says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from latentwire_fast.config.sweep import planned_runs, read_sweep, sweep_from_json
from latentwire_fast.errors import ConfigError
from latentwire_fast.registry import (
    ADAPTERS,
    ATTACHMENTS,
    BOTTLENECKS,
    ENCODERS,
    OBJECTIVES,
    POOLERS,
    SCHEDULES,
    Registry,
)

FOLDER = Path(__file__).parents[2] / "configs" / "sweeps"
FILES = sorted(FOLDER.glob("*.json"))
TABLES = {
    "encoder": ENCODERS,
    "pooler": POOLERS,
    "bottleneck": BOTTLENECKS,
    "adapter": ADAPTERS,
    "attachment": ATTACHMENTS,
    "objective": OBJECTIVES,
    "schedule": SCHEDULES,
}


def sweep(**changes: Any) -> dict[str, Any]:
    return {"preset": "testbed_smoke", "variants": {"base": []}, **changes}


def test_variants_groups_and_grids_become_runs() -> None:
    found = sweep_from_json(
        sweep(
            seeds=[3, 4],
            set=["log_every=2"],
            groups={"small": ["encoder.latents=2", "@narrow"], "narrow": ["encoder.d_z=4"]},
            variants={"base": [], "small": ["@small"]},
            grid={"bottleneck.bits": [8, 4], "rate": {"low": ["optim.adamw_lr=0.001"]}},
        )
    )
    runs = planned_runs(found, imports=["json"])
    names = ["base", "small", "bits8-ratelow", "bits4-ratelow"]
    assert [run.name for run in runs] == [f"{n}/seed{s}" for s in (3, 4) for n in names]
    assert found.compared_to == "base"
    small, last = runs[1], runs[-1]
    assert (small.config.encoder.latents, small.config.encoder.d_z) == (2, 4)
    assert small.arguments[:3] == ("testbed_smoke", "--seed", "3")
    assert small.arguments[-2:] == ("--import", "json")
    assert (last.config.bottleneck.bits, last.config.seed) == (4, 4)
    assert last.config.optim.adamw_lr == 0.001
    assert all(run.config.log_every == 2 for run in runs)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"variants": {}}, "at least one"),
        ({"variants": {"../up": []}}, "names a folder"),
        ({"variants": []}, "expected lists of assignments by name"),
        ({"variants": {"base": "seed=1"}}, "base"),
        ({"variants": {"mine": "log_every=1"}}, "variants: mine: expected a list of assignments"),
        ({"preset": ...}, "preset is missing"),
        ({"seeds": []}, "at least one"),
        ({"seeds": [1, 1]}, "twice"),
        ({"base": "other"}, "none of the variants"),
        ({"grid": {"encoder.latents": []}}, "no values"),
        ({"grid": {"encoder.latents": [2, 3, 2]}}, "one value twice"),
        ({"grid": {"encoder.latents": 3}}, "expected a list of values"),
        ({"grid": {"kd": {"on": "x"}}}, "expected a list of assignments"),
        ({"grid": {"encoder.latents": [2]}, "variants": {"latents2": []}}, "rename that"),
        ({"colour": 1}, "unknown colour"),
        ({"assignments": []}, "named set"),
    ],
)
def test_a_mistake_in_a_file_is_said(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = tmp_path / "sweep.json"
    left = {key: value for key, value in sweep(**changes).items() if value is not ...}
    path.write_text(json.dumps(left))
    with pytest.raises(ConfigError, match=words) as caught:
        read_sweep(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("@nothing", "no group '@nothing'; there are loop"),
        ("@loop", "holds itself"),
        ("encoder.latent=2", "did you mean latents"),
        ("encoder.latents=0", "latents=0"),
        ("seed=5", "it sets seed; write that to `seeds`"),
    ],
)
def test_a_variant_that_cannot_be_trained_is_named(entry: str, words: str) -> None:
    found = sweep_from_json(sweep(groups={"loop": ["@loop"]}, variants={"mine": [entry]}))
    with pytest.raises(ConfigError, match=words) as caught:
        planned_runs(found)
    assert "'mine'" in str(caught.value)


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_the_sweeps_of_the_tree_are_trainable_configurations(file: Path) -> None:
    found = read_sweep(file)
    runs = planned_runs(found)
    assert len(runs) == len(found.variants) * len(found.seeds)


@pytest.mark.parametrize("kind", TABLES)
def test_every_part_has_a_smoke(kind: str) -> None:
    table: Registry = TABLES[kind]
    variants = read_sweep(FOLDER / "smokes.json").variants
    missing = [name for name in table.names() if f"{kind}_{name}" not in variants]
    assert not missing, f"configs/sweeps/smokes.json has no variant {kind}_{missing[0]}: add one"
