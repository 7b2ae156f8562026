"""The clock in a training step: what it counts where, and that it changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import step_clock, train_step
from bench.step_clock import LOGGING, OTHER, StepClock, TimedTrainer
from latentwire_fast.errors import ConfigError
from latentwire_fast.training.tracking import read_records
from latentwire_fast.training.trainer import Trainer
from runs import store, tiny_config

pytestmark = pytest.mark.usefixtures("on_the_cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> StepClock:
    """A clock on which each look takes one second."""
    times = iter(range(1000))
    monkeypatch.setattr(step_clock, "_now", lambda: float(next(times)))
    return StepClock()


def test_a_part_interrupts_the_one_around_it(clock: StepClock) -> None:
    clock.begin_step()
    clock.enter("a")
    clock.wrap("b", lambda: None)()
    clock.turn("c")
    clock.leave()
    clock.end_step("only", logged=False)
    ((stage, logged, seconds),) = clock.steps
    assert (stage, logged) == ("only", False)
    assert seconds == {OTHER: 2, "a": 2, "b": 1, "c": 1}


def test_an_error_ends_its_part(clock: StepClock) -> None:
    def fail() -> None:
        raise RuntimeError("no memory")

    clock.begin_step()
    with pytest.raises(RuntimeError):
        clock.wrap("a", fail)()
    clock.end_step("only", logged=False)
    assert clock.steps[0][2] == {OTHER: 2, "a": 1}


def test_logging_is_what_logged_steps_take_longer(clock: StepClock) -> None:
    for step in range(9):
        clock.begin_step()
        clock.wrap("a", lambda: None)()
        logged = step % 4 == 0
        if logged:
            for _ in range(8):
                clock.turn(OTHER)
        clock.end_step("one" if step else "other", logged=logged)
    parts = clock.medians("one", skip=0, log_every=4)
    assert {name: part["ms"] for name, part in parts.items()} == {
        OTHER: 2e3,
        LOGGING: 2e3,
        "a": 1e3,
    }
    assert {name: part["share"] for name, part in parts.items()} == {
        OTHER: 0.4,
        LOGGING: 0.4,
        "a": 0.2,
    }


def test_every_part_of_a_run_is_seen(
    llama_folder: Path, qwen_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two steps of the stage with distillation: readers, targets, both optimisers."""
    path = store(tiny_config(llama_folder, qwen_folder), tmp_path / "run.json")
    options = ["--stage", "answer", "--steps", "2", "--warmup", "1", "--threads", "1"]
    before = torch.get_num_threads()
    train_step.main([str(path), *options, "--json", str(tmp_path / "out.json")])
    torch.set_num_threads(before)
    result = json.loads((tmp_path / "out.json").read_text())
    readers = {
        f"{name} {part}"
        for name in (llama_folder.name, qwen_folder.name)
        for part in ("forward", "backward", "targets")
    }
    assert result["parts"].keys() == readers | {
        "data",
        "prompts",
        "losses",
        "losses backward",
        "encoder forward",
        "encoder backward",
        "adapters forward",
        "adapters backward",
        "optimiser Muon",
        "optimiser AdamW",
        OTHER,
        LOGGING,
    }
    assert sum(part["share"] for part in result["parts"].values()) == pytest.approx(1.0)
    assert (result["stage"], result["threads"]) == ("answer", 1)
    assert result["peak_bytes"] > 10 * 2**20
    printed = capsys.readouterr().out
    assert all(f"\n{name}  " in printed for name in [*result["parts"], "all"])


def test_the_clock_changes_no_loss(llama_folder: Path, qwen_folder: Path, tmp_path: Path) -> None:
    config = tiny_config(llama_folder, qwen_folder)
    losses = []
    for kind in (Trainer, TimedTrainer):
        folder = tmp_path / kind.__name__
        kind(config, folder, progress=False).run()
        losses.append([r["loss"] for r in read_records(folder / "diagnostics.jsonl")])
    assert losses[0] == losses[1]
    assert len(losses[0]) == config.total_steps


def test_an_unknown_stage_is_refused(llama_folder: Path, tmp_path: Path) -> None:
    path = store(tiny_config(llama_folder), tmp_path / "run.json")
    with pytest.raises(ConfigError, match="no stage 'warm'; its stages are"):
        train_step.main([str(path), "--stage", "warm"])
