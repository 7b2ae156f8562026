"""A time limit: which steps are left out, and that the schedule comes to its end all the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from latentwire_fast.config.overrides import with_overrides
from latentwire_fast.errors import ConfigError, RunStopped
from latentwire_fast.training import step as step_module
from latentwire_fast.training.time_limit import next_step, passes
from latentwire_fast.training.tracking import read_records
from latentwire_fast.training.trainer import Trainer
from runs import changed, tiny_config

pytestmark = pytest.mark.usefixtures("on_the_cpu")


@pytest.fixture
def minute_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock on which each look takes half a minute: a step takes half a minute."""
    times = iter(range(0, 30_000, 30))
    monkeypatch.setattr(step_module.time, "perf_counter", lambda: float(next(times)))


def test_without_a_limit_every_step_is_done(llama_folder: Path) -> None:
    config = tiny_config(llama_folder)
    assert [next_step(config, step, 1e9) for step in range(6)] == [1, 2, 3, 4, 5, 6]


def test_steps_are_left_out_where_time_is_short(llama_folder: Path) -> None:
    """6 steps in 2 minutes: one is due every 20 seconds."""
    config = tiny_config(llama_folder, minutes=2.0)
    assert next_step(config, 0, 1.0) == 1  # ahead of its time: none is left out
    assert next_step(config, 0, 70.0) == 3
    assert next_step(config, 3, 61.0) == 4
    assert next_step(config, 1, 1e9) == 6  # never behind the end
    assert next_step(config, 0, 60.0, 59.0) == 1  # nearly all of it was work that is done once
    assert next_step(config, 0, 90.0, 60.0) == 3  # half of the minute that is left
    assert next_step(config, 0, 130.0, 125.0) == 6  # no time is left


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [(0, 1, False), (1, 2, True), (1, 3, True), (2, 3, False), (2, 9, True), (-1, 0, True)],
)
def test_what_is_due_every_so_many_steps(before: int, after: int, expected: bool) -> None:
    assert passes(before, after, 2) == expected


@pytest.mark.usefixtures("minute_steps")
def test_a_run_ends_in_time_and_in_its_last_stage(llama_folder: Path, tmp_path: Path) -> None:
    """Half a minute per step, 6 steps in 1.5 minutes: every second step, all three stages."""
    config = tiny_config(llama_folder, minutes=1.5)
    trainer = Trainer(config, tmp_path, progress=False)
    trainer.run()
    found = read_records(trainer.folder.diagnostics)
    assert [(r["step"], r["stage"]) for r in found] == [
        (0, "pretrain"),
        (2, "answer"),
        (4, "quantized"),
    ]
    assert trainer.finished
    assert trainer.session.state.step == config.total_steps


@pytest.mark.usefixtures("minute_steps")
def test_a_stopped_run_keeps_its_time(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(llama_folder, minutes=1.5)
    trainer = Trainer(config, tmp_path, progress=False)
    trainer.signals.number = 15
    with pytest.raises(RunStopped, match="after step 2 of 6"):
        trainer.run()
    again = Trainer(config, tmp_path, progress=False)
    again.run()
    assert again.session.state.seconds == 90.0
    assert [r["step"] for r in read_records(again.folder.diagnostics)] == [0, 2, 4]


def test_a_limit_is_a_time(llama_folder: Path) -> None:
    config = tiny_config(llama_folder)
    assert with_overrides(config, minutes=0.5).minutes == 0.5
    for minutes in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="minutes="):
            changed(config, minutes=minutes)
