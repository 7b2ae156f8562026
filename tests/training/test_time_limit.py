"""A time limit: which steps are left out, and that the schedule comes to its end all the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from latentwire_fast.config.overrides import with_overrides
from latentwire_fast.config.schema import RunConfig, StageConfig
from latentwire_fast.errors import ConfigError, RunStopped
from latentwire_fast.training import step as step_module
from latentwire_fast.training.time_limit import Pace, next_step, passes
from latentwire_fast.training.tracking import read_records
from latentwire_fast.training.trainer import Trainer
from runs import changed, tiny_config

pytestmark = pytest.mark.usefixtures("on_the_cpu")


@pytest.fixture
def minute_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock on which each look takes half a minute: a step takes half a minute."""
    times = iter(range(0, 30_000, 30))
    monkeypatch.setattr(step_module.time, "perf_counter", lambda: float(next(times)))


def paced(*seconds: float, stage: str = "s") -> Pace:
    """The pace behind a first step of 100 s and steps of these seconds, all of one stage."""
    pace = Pace()
    for elapsed in (100.0, *seconds):
        pace.add(elapsed, stage=stage)
    return pace


def test_without_a_limit_every_step_is_done(llama_folder: Path) -> None:
    config = tiny_config(llama_folder)
    found = [next_step(config, step, 1e9, paced(1.0)) for step in range(6)]
    assert found == [1, 2, 3, 4, 5, 6]


def test_steps_are_left_out_where_time_is_short(llama_folder: Path) -> None:
    """6 steps in 2 minutes."""
    config = tiny_config(llama_folder, minutes=2.0)
    assert next_step(config, 0, 1.0, paced(10.0)) == 1  # time for all: none is left out
    assert next_step(config, 0, 60.0, paced(24.0)) == 2  # time for 2.5 of the 5 that are left
    assert next_step(config, 3, 61.0, paced(10.0)) == 4
    assert next_step(config, 1, 110.0, paced(10.0)) == 5  # time for one: the last
    assert next_step(config, 1, 119.9, paced(10.0)) == 5
    assert next_step(config, 1, 1e9, paced(10.0)) == 6  # never behind the end
    assert next_step(config, 0, 119.0, Pace()) == 1  # no pace is known yet


def test_the_pace_is_that_of_recent_steps() -> None:
    pace = Pace()
    assert pace.seconds is None
    pace.add(4.5, stage="a")  # kernels are compiled
    assert pace.seconds is None
    for _ in range(8):
        pace.add(0.04, stage="a")
    assert pace.seconds == pytest.approx(0.04)
    pace.add(3.0, stage="a")  # one more kernel
    pace.add(4.5, stage="b")  # the first step of another stage
    assert pace.seconds == pytest.approx(0.04)
    pace.add(0.1, stage="b")
    assert pace.seconds == pytest.approx(0.1)  # the other stage's steps are forgotten
    pace.beside = 1.2  # a validation, of the 12 steps until now
    assert pace.seconds == pytest.approx(0.2)


def simulate(config: RunConfig, cost: Callable[[int], float], first: float) -> list[int]:
    """The steps that a run with a fake clock does; the first of each stage takes `first`."""
    step, clock, pace, done, stages = 0, 0.0, Pace(), [], set()
    while step < config.total_steps:
        name = config.stage_at(step)[0].name
        elapsed = cost(step) + (0.0 if name in stages else first)
        stages.add(name)
        done.append(step)
        clock += elapsed
        pace.add(elapsed, stage=name)
        step = next_step(config, step, clock, pace)
    return done


def test_a_slow_first_step_leaves_out_no_stage(llama_folder: Path) -> None:
    """700 steps of 0.04 s in 0.4 minutes, the first of which takes 4.5 s more: time for 487."""
    stages = (StageConfig("align", 80), StageConfig("answer", 120), StageConfig("quantized", 500))
    config = tiny_config(llama_folder, stages=stages, minutes=0.4)
    done = simulate(config, lambda step: 0.04, 0.0)
    assert len(done) == pytest.approx(600, abs=2)
    done = simulate(config, lambda step: 0.04, 4.5)
    assert sum(4.5 if step == 0 else 0.04 for step in done) < 24
    shares = [sum(a <= s < b for s in done) / (b - a) for a, b in ((0, 80), (80, 200), (200, 700))]
    # Each later first step costs time as well, which is taken from what follows it.
    assert shares[0] > 0.65
    assert shares[0] > shares[1] > shares[2] > 0.2
    assert max(b - a for a, b in pairwise(done)) <= 5
    assert done[-1] == 699


def test_uneven_steps_are_left_out_evenly(llama_folder: Path) -> None:
    """Time for 2 of 3 steps, where every other step takes three times as long."""
    config = tiny_config(llama_folder, stages=(StageConfig("a", 900),), minutes=20.0)
    done = simulate(config, lambda step: 1.0 + 2.0 * (step % 2), 0.0)
    thirds = [sum(a <= step < a + 300 for step in done) for a in (0, 300, 600)]
    assert sum(thirds) == pytest.approx(600, abs=40)
    assert max(thirds) - min(thirds) < 90
    assert done[-1] >= 890


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [(0, 1, False), (1, 2, True), (1, 3, True), (2, 3, False), (2, 9, True), (-1, 0, True)],
)
def test_what_is_due_every_so_many_steps(before: int, after: int, expected: bool) -> None:
    assert passes(before, after, 2) == expected


def four_steps_a_stage(folder: Path, **changes: Any) -> RunConfig:
    """The tiny run with four steps in each of its three stages."""
    stages = tuple(replace(stage, steps=4) for stage in tiny_config(folder).stages)
    return tiny_config(folder, stages=stages, **changes)


@pytest.mark.usefixtures("minute_steps")
def test_a_run_ends_in_time_and_in_its_last_stage(llama_folder: Path, tmp_path: Path) -> None:
    """Half a minute per step, 12 steps in 3 minutes. The pace is known behind the second step:
    then there is time for 4 more of 10, in all three stages."""
    config = four_steps_a_stage(llama_folder, minutes=3.0)
    trainer = Trainer(config, tmp_path, progress=False)
    trainer.run()
    found = read_records(trainer.folder.diagnostics)
    assert [(r["step"], r["stage"]) for r in found] == [
        (0, "pretrain"),
        (1, "pretrain"),
        (3, "pretrain"),
        (6, "answer"),
        (8, "quantized"),
        (11, "quantized"),
    ]
    assert trainer.finished
    assert trainer.session.state.step == config.total_steps


@pytest.mark.usefixtures("minute_steps")
def test_a_stopped_run_keeps_its_time(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = four_steps_a_stage(llama_folder, minutes=3.0)
    trainer = Trainer(config, tmp_path, progress=False)
    trainer.signals.number = 15
    with pytest.raises(RunStopped, match="after step 1 of 12"):
        trainer.run()
    again = Trainer(config, tmp_path, progress=False)
    again.run()
    assert again.session.state.seconds == 180.0
    steps = [r["step"] for r in read_records(again.folder.diagnostics)]
    assert steps == [0, 1, 2, 5, 8, 11]  # the pace is measured anew


def test_a_limit_is_a_time(llama_folder: Path) -> None:
    config = tiny_config(llama_folder)
    assert with_overrides(config, minutes=0.5).minutes == 0.5
    for minutes in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="minutes="):
            changed(config, minutes=minutes)
