"""A run's paths: which of them belong to the run."""

from __future__ import annotations

from pathlib import Path

import pytest

from latentwire_fast.files.run_folder import RunFolder


@pytest.mark.parametrize(
    ("path", "owned"),
    [
        *(("config.json", True), ("diagnostics.jsonl", True), ("nonfinite.json", True)),
        *((".lock", True), ("model", True), ("model/model.safetensors", True)),
        *(("validation.json", True), ("model_best/model.safetensors", True)),
        *(("checkpoints/step-00000001/state.json", True), ("frozen_work/x.bin", True)),
        *(("tensorboard/events", True), ("eval/metrics.json", True), ("eval/report.md", True)),
        *(("eval", False), ("eval/mine.json", False), ("metrics.json", False), ("", False)),
        *(("modelling", False), ("../config.json", False), ("eval/../config.json", True)),
    ],
)
def test_what_belongs_to_the_run(tmp_path: Path, path: str, owned: bool) -> None:
    folder = RunFolder(tmp_path / "run")
    assert folder.owns(folder.path / path) is owned


def test_a_relative_folder_owns_absolute_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = RunFolder(Path("runs/demo"))
    assert folder.name == "demo"
    assert folder.owns(tmp_path / "runs" / "demo" / "config.json")
    assert not folder.owns(tmp_path / "config.json")


def test_a_run_is_trained_once_its_model_is_in_place(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.model.mkdir()
    assert not folder.is_trained
    (folder.model / "config.json").write_text("{}")
    assert folder.is_trained
