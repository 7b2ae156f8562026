"""Trackers by name: TensorBoard, and those of accelerate, here as modules that write down calls."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from latentwire_fast.errors import ConfigError
from latentwire_fast.training.trainer import Trainer
from runs import stop_after_a_step, tiny_config, train

_FAKE = """
calls = []

class Run:
    def log(self, values, step=None):
        calls.append(("log", step, values))

    def finish(self):
        calls.append(("finish",))

def init(project, **options):
    {refuse}
    calls.append(("init", project, options))
    return Run()
"""


def fake(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *, refuse: str = "pass"
) -> ModuleType:
    """A package of a tracker that writes down what it is asked."""
    (folder / f"{name}.py").write_text(_FAKE.format(refuse=refuse))
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.mark.usefixtures("on_the_cpu")
def test_trackers_get_what_the_log_has(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb, trackio = (fake(name, tmp_path, monkeypatch) for name in ("wandb", "trackio"))
    config = tiny_config(llama_folder, trackers=("wandb", "trackio"), log_every=1)
    run_dir = tmp_path / "run"
    stop_after_a_step(config, run_dir)
    train(config, run_dir)
    assert not (run_dir / "tensorboard").exists()
    log = [json.loads(line) for line in (run_dir / "diagnostics.jsonl").read_text().splitlines()]
    for tracker in (wandb, trackio):
        kinds = [call[0] for call in tracker.calls]
        assert kinds.count("init") == kinds.count("finish") == 2, "stopped once, and gone on"
        shown = {call[1]: call[2] for call in tracker.calls if call[0] == "log"}
        assert [*shown] == [record["step"] for record in log]
        assert all(shown[record["step"]]["loss"] == record["loss"] for record in log)
        assert "losses/answer/llama" in shown[log[-1]["step"]]
        starts = [call[1:] for call in tracker.calls if call[0] == "init"]
        assert {project for project, _ in starts} == {"latentwire-fast"}
        assert all(options["name"] == "run" for _, options in starts)
        assert all(options["config"]["seed"] == config.seed for _, options in starts)
        assert starts[1][1]["resume"] == "allow"
    assert wandb.calls[0][2]["id"] == "run"
    assert [call[2]["resume"] for call in (wandb.calls[0], trackio.calls[0])] == [None, "never"]


@pytest.mark.parametrize("names", [("mlboard",), ("tensorboard", "tensorboard")])
def test_unknown_trackers_are_refused(llama_folder: Path, names: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"trackers: .*expected each at most once of tensorboard"):
        tiny_config(llama_folder, trackers=names)


def test_a_missing_package_is_refused_before_anything(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    config = tiny_config(llama_folder, trackers=("tensorboard", "wandb"))
    with pytest.raises(ConfigError, match="package 'wandb' is not installed; pip install wandb"):
        Trainer(config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("on_the_cpu")
def test_a_tracker_that_does_not_start_is_one_line(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake("wandb", tmp_path, monkeypatch, refuse="raise RuntimeError('no API key\\nanywhere')")
    with pytest.raises(ConfigError, match=r"'wandb' does not start \(no API key anywhere\)"):
        train(tiny_config(llama_folder, trackers=("wandb",)), tmp_path / "run")
