"""Stopping and going on: C3 (bit-exact), C2 (SIGKILL at any time), signals, torn ends."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch

from crashes import InScript
from latentwire_fast.config.presets import weighted
from latentwire_fast.config.schema import RunConfig, StageConfig
from latentwire_fast.data.streams import TrainItem
from latentwire_fast.errors import CheckpointError, RunStopped
from latentwire_fast.models.interlingua import Interlingua
from latentwire_fast.objectives.objective_set import Losses, ObjectiveSet
from latentwire_fast.readers.reader import load_readers
from latentwire_fast.training import frozen_work, session
from latentwire_fast.training.checkpoint import latest_checkpoint, load_checkpoint
from latentwire_fast.training.trainer import Trainer
from runs import (
    changed,
    model_digest,
    new_process,
    records,
    store,
    stored,
    tiny_config,
    tiny_squad,
    train,
    training_state,
)

pytestmark = pytest.mark.usefixtures("on_the_cpu")

MICRO_BATCHES = 2  # per step of the tiny configuration


class Watch:
    """The items of every batch prepared, and what to do at the n-th micro-batch (from 0)."""

    def __init__(self, patch: pytest.MonkeyPatch, act: Any = None, *, at: int = -1) -> None:
        self.batches: list[list[str]] = []
        prepare, compute = ObjectiveSet.prepare, ObjectiveSet.compute
        calls = 0

        def prepared(objectives: ObjectiveSet, items: list[TrainItem], *rest: Any) -> Any:
            self.batches.append([item.id for item in items])
            return prepare(objectives, items, *rest)

        def computed(objectives: ObjectiveSet, *args: Any, **options: Any) -> Losses:
            nonlocal calls
            calls += 1
            if calls - 1 == at:
                act()
            return compute(objectives, *args, **options)

        # Before the first step, the size of a cache is estimated from prompts: no batch.
        patch.setattr(frozen_work, "estimated_bytes", lambda *_: 0)
        patch.setattr(ObjectiveSet, "prepare", prepared)
        patch.setattr(ObjectiveSet, "compute", computed)


class Uninterrupted:
    """The run that interrupted ones are held against."""

    def __init__(self, config: RunConfig, run_dir: Path) -> None:
        self.config = config
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ACCELERATE_USE_CPU", "true")
            watch = Watch(patch)
            self.state = training_state(train(config, run_dir))
        self.batches = watch.batches
        self.records = records(run_dir)
        self.digest = model_digest(run_dir)


@pytest.fixture(scope="module", params=["testbed", "file"])
def plain(
    request: pytest.FixtureRequest,
    llama_folder: Path,
    qwen_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Uninterrupted:
    """Endless data, or a file whose epochs end within batches (its KD has a teacher cache)."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    config = tiny_config(llama_folder, qwen_folder)
    if request.param == "file":
        data = tiny_squad(folder / "data.json")
        config = changed(config, data={"source": str(data)})
    return Uninterrupted(config, folder / "run")


def assert_the_same_run(trainer: Trainer, plain: Uninterrupted, run_dir: Path) -> None:
    assert training_state(trainer) == plain.state
    assert records(run_dir) == plain.records
    assert model_digest(run_dir) == plain.digest


class Crash(Exception):
    """What no part of the library expects."""


def crash() -> None:
    raise Crash


# --- C3: stopping and going on, bit for bit -----------------------------------------------------


@pytest.mark.parametrize("save_every", [1, 2])
@pytest.mark.parametrize("step", [0, 3, 4], ids=["first", "middle", "last but one"])
def test_resuming_is_bit_exact(
    plain: Uninterrupted, tmp_path: Path, step: int, save_every: int
) -> None:
    """Stopped between the two micro-batches of a step; with `save_every=2` a step is done again.

    The six steps are three stages of two, so 4 is also the first step of a stage.
    """
    config = changed(plain.config, save_every=save_every)
    with pytest.MonkeyPatch.context() as patch:
        Watch(patch, crash, at=step * MICRO_BATCHES + 1)
        with pytest.raises(Crash):
            train(config, tmp_path)
    assert len(records(tmp_path)) == step
    saved = step - step % save_every
    assert (latest_checkpoint(tmp_path / "checkpoints") is not None) == (saved > 0)
    with pytest.MonkeyPatch.context() as patch:
        watch = Watch(patch)
        trainer = train(config, tmp_path, process=1)
    assert watch.batches == plain.batches[saved:]
    assert_the_same_run(trainer, plain, tmp_path)


def test_an_epoch_ends_within_a_batch(plain: Uninterrupted) -> None:
    """What the file's case is for: data order across epochs, and a batch that spans two."""
    if plain.config.data.source == "testbed":
        assert len({name for batch in plain.batches for name in batch}) == 6 * 4
        return
    names = [name for batch in plain.batches for name in batch]
    size = len(set(names))
    assert size % len(plain.batches[0]) != 0
    assert len(names) > 2 * size
    epochs = [names[i : i + size] for i in range(0, len(names) - size, size)]
    assert all(set(epoch) == set(names) for epoch in epochs)
    assert epochs[0] != epochs[1], "each epoch has its own order"


def test_stopped_again_and_again(plain: Uninterrupted, tmp_path: Path) -> None:
    config = changed(plain.config, save_every=1)
    for process in range(6):
        with pytest.MonkeyPatch.context() as patch:
            Watch(patch, crash, at=MICRO_BATCHES)  # one step further each time
            with contextlib.suppress(Crash):
                trainer = train(config, tmp_path, process=process)
    assert_the_same_run(trainer, plain, tmp_path)


def test_a_damaged_newest_checkpoint_costs_steps_not_the_run(
    plain: Uninterrupted, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = changed(plain.config, save_every=1)
    with pytest.MonkeyPatch.context() as patch:
        Watch(patch, crash, at=4 * MICRO_BATCHES)
        with pytest.raises(Crash):
            train(config, tmp_path)
    newest = tmp_path / "checkpoints" / "step-00000004" / "model.safetensors"
    damaged = bytearray(newest.read_bytes())
    damaged[-5] ^= 1
    newest.write_bytes(damaged)
    with pytest.MonkeyPatch.context() as patch:
        watch = Watch(patch)
        trainer = train(config, tmp_path, process=1)
    assert "passing over a damaged checkpoint" in caplog.text
    assert watch.batches == plain.batches[3:]
    assert_the_same_run(trainer, plain, tmp_path)


def test_weights_that_are_not_the_saved_ones_are_refused(
    plain: Uninterrupted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint names a digest of the trained part: it must be what is loaded."""
    with pytest.MonkeyPatch.context() as patch:
        Watch(patch, crash, at=2 * MICRO_BATCHES)
        with pytest.raises(Crash):
            train(plain.config, tmp_path)

    def other(path: Path) -> Any:
        checkpoint = load_checkpoint(path)
        next(iter(checkpoint.tensors["model"].values())).flatten()[0] += 1
        return checkpoint

    monkeypatch.setattr("latentwire_fast.training.state.load_checkpoint", other)
    with pytest.raises(CheckpointError, match="do not match their digest"):
        train(plain.config, tmp_path)


def test_data_that_changed_since_is_refused(llama_folder: Path, tmp_path: Path) -> None:
    """The batches of the steps that are left would be others than those of one run."""
    data, run_dir = tiny_squad(tmp_path / "data.json"), tmp_path / "run"
    config = tiny_config(llama_folder, data={"source": str(data)})
    with pytest.MonkeyPatch.context() as patch:
        Watch(patch, crash, at=2 * MICRO_BATCHES)
        with pytest.raises(Crash):
            train(config, run_dir)
    text = data.read_text()
    tiny_squad(data, passages=9)
    with pytest.raises(CheckpointError, match=r"training data has changed since; put back"):
        train(config, run_dir)
    data.write_text(text)
    assert train(config, run_dir).finished


# --- signals ------------------------------------------------------------------------------------


def send(number: int, times: int = 1) -> Any:
    def act() -> None:
        for _ in range(times):
            os.kill(os.getpid(), number)

    return act


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_saves_at_the_end_of_the_step(
    plain: Uninterrupted, tmp_path: Path, number: int
) -> None:
    config = changed(plain.config, save_every=1000)
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.MonkeyPatch.context() as patch:
        Watch(patch, send(number), at=2 * MICRO_BATCHES)
        with pytest.raises(
            RunStopped,
            match=r"by a signal after step 3 of 6; everything is saved. Run the same command",
        ) as stopped:
            train(config, tmp_path)
    assert stopped.value.status == 128 + number
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert load_checkpoint(tmp_path / "checkpoints").step == 3
    assert len(records(tmp_path)) == 3
    assert_the_same_run(train(config, tmp_path, process=1), plain, tmp_path)


def test_a_signal_in_the_last_step_loses_nothing(plain: Uninterrupted, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        Watch(patch, send(signal.SIGINT), at=5 * MICRO_BATCHES)
        with pytest.raises(RunStopped, match="after step 6 of 6"):
            train(plain.config, tmp_path)
    trainer = train(plain.config, tmp_path, process=1)
    assert trainer.finished
    assert_the_same_run(trainer, plain, tmp_path)


def test_a_second_ctrl_c_interrupts_at_once(plain: Uninterrupted, tmp_path: Path) -> None:
    config = changed(plain.config, save_every=1)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch:
        Watch(patch, send(signal.SIGINT, times=2), at=2 * MICRO_BATCHES)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path)
    assert signal.getsignal(signal.SIGINT) is handler
    assert load_checkpoint(tmp_path / "checkpoints").step == 2, "the step was not over"
    assert_the_same_run(train(config, tmp_path, process=1), plain, tmp_path)


# --- the end of a run ---------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "half way", "before the rename"])
def test_a_crash_while_the_model_is_saved(plain: Uninterrupted, tmp_path: Path, when: str) -> None:
    save = Interlingua.save_pretrained

    def crashing(model: Interlingua, folder: Path) -> Path:
        if when != "before":
            save(model, folder)
        if when == "half way":
            (folder / "config.json").unlink()
            weights = folder / "model.safetensors"
            os.truncate(weights, weights.stat().st_size // 2)
        raise Crash

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Interlingua, "save_pretrained", crashing)
        with pytest.raises(Crash):
            train(plain.config, tmp_path)
    assert not Trainer(plain.config, tmp_path).finished
    trainer = train(plain.config, tmp_path, process=1)
    assert trainer.finished
    assert_the_same_run(trainer, plain, tmp_path)
    assert not (tmp_path / "model.tmp").exists()


# --- C2: kills at any instant -------------------------------------------------------------------


def reporting(descriptor: int) -> None:
    """From now on each step and each save of this process writes a line when it is done."""

    def report(text: str) -> None:
        os.write(descriptor, f"{text}\n".encode())

    step, save = Trainer._train_step, Trainer.save

    def reported_step(trainer: Trainer) -> Any:
        record = step(trainer)
        report(f"step {trainer.session.state.step + 1}")
        return record

    def reported_save(trainer: Trainer) -> None:
        report(f"saving {trainer.session.state.step}")
        save(trainer)
        report(f"saved {trainer.session.state.step}")

    Trainer._train_step, Trainer.save = reported_step, reported_save  # type: ignore[method-assign]


def case_kill(root: Path) -> dict[str, Any]:
    """Start a training, SIGKILL it at a random instant, again and again (as often as a stage has
    steps); then let it finish.

    The libraries are imported and the readers loaded once; each training is a fork. When to kill is
    drawn as a number of reports to wait for, and a share of the time to the next: on a slow machine
    as on a fast one, kills fall everywhere from the loading of a checkpoint to the writing of the
    next.
    """
    config, run_dir = stored(root / "config.json"), root / "run"
    os.environ["ACCELERATE_USE_CPU"] = "true"  # a fork cannot begin to use a GPU
    kills, readers = config.stages[0].steps, load_readers(config.readers, torch.device("cpu"))
    session.load_readers = lambda *_: readers
    rng = random.Random(0)
    reached, while_saving, finished = 0, 0, False
    start_up, pause = 0.5, 0.05  # seconds to the first report, and between two
    for _ in range(kills):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            reporting(writing)
            try:
                train(config, run_dir)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as reports:
            lines, times = [], [time.monotonic()]
            for _ in range(rng.randrange(8)):
                lines.append(reports.readline())
                times.append(time.monotonic())
            if len(times) > 2:
                start_up = times[1] - times[0]
                pause = (times[-1] - times[1]) / (len(times) - 2)
            time.sleep(rng.uniform(0, pause if lines else start_up))
            os.kill(child, signal.SIGKILL)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            lines += reports.readlines()
        assert status in (0, -signal.SIGKILL), f"the training failed by itself: {lines}"
        finished = status == 0
        if finished:
            break
        done = [int(line.split()[1]) for line in lines if line.startswith("saved")]
        while_saving += bool(lines) and lines[-1].startswith("saving")
        saved = max([reached, *done])
        if saved:
            reached = load_checkpoint(run_dir / "checkpoints").step
            assert reached >= saved, (reached, lines)
    new_process(1)
    train(config, run_dir)
    return {"reached": reached, "while_saving": while_saving, "finished": finished}


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_sigkill_at_random_instants_loses_nothing(
    llama_folder: Path, tmp_path: Path, in_script: InScript, kills: int
) -> None:
    """Nothing that was saved is lost, and in the end the run is the one nobody disturbed."""
    stages = tuple(
        StageConfig(name, steps=kills, **options)
        for name, options in {
            "pretrain": {"objectives": weighted(autoencode=1.0)},
            "answer": {},
            "quantized": {"quantize": 6},
        }.items()
    )
    config = tiny_config(llama_folder, stages=stages, save_every=1)
    store(config, tmp_path / "config.json")
    result = in_script(case_kill, tmp_path)
    assert result["reached"] > 0
    assert not result["finished"], "the run was over before the last kill"
    train(config, tmp_path / "undisturbed")
    assert records(tmp_path / "run") == records(tmp_path / "undisturbed")
    assert model_digest(tmp_path / "run") == model_digest(tmp_path / "undisturbed")
