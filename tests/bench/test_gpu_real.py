"""The pretrained readers' run on a machine without a network: parts of files, plan, command."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from bench.real import file_parts, gpu_real
from bench.real.file_parts import PartsError, join, split
from latentwire_fast.readers.sources import packages


@pytest.mark.parametrize("size", [1, 7, 1000, 1001, 5000])
def test_a_file_comes_back_from_its_parts(size: int, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(bytes(i % 251 for i in range(1000)))
    listed = split(file, tmp_path / "parts", size=size)
    parts = sorted(p for p in (tmp_path / "parts").iterdir() if p != listed)
    assert len(parts) == -(-1000 // size)
    assert all(part.stat().st_size <= size for part in parts)
    whole = join(listed, tmp_path / "out")
    assert whole == tmp_path / "out" / "model.gguf"
    assert whole.read_bytes() == file.read_bytes()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.gguf"]


def test_a_wrong_part_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"x" * 25)
    listed = split(file, tmp_path / "parts", size=10)
    part = tmp_path / "parts" / "model.gguf.01"
    part.write_bytes(b"y" * 10)
    with pytest.raises(PartsError, match=r"model.gguf.01 is not what was written"):
        join(listed, tmp_path)
    part.unlink()
    with pytest.raises(PartsError, match=r"model.gguf.01 is missing; bring it here"):
        join(listed, tmp_path / "other")
    assert not (tmp_path / "other" / "model.gguf").exists()
    listed.write_text("{}")
    assert file_parts.main(["join", str(listed), str(tmp_path)]) == 2
    assert "is no list of parts" in capsys.readouterr().err


def test_parts_do_not_leave_their_folder(tmp_path: Path) -> None:
    """Names in a list are names, not paths."""
    file = tmp_path / "model.gguf"
    file.write_bytes(b"x" * 25)
    listed = split(file, tmp_path / "parts")
    entry = json.loads(listed.read_text())
    entry["name"] = "../../model.gguf"
    listed.write_text(json.dumps(entry))
    assert join(listed, tmp_path / "out") == tmp_path / "out" / "model.gguf"


def test_pack_and_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was packed becomes a training command with the weights put together."""
    weights = {}
    for name in gpu_real.READERS.values():
        weights[name] = tmp_path / f"{name.partition(':')[2]}.gguf"
        weights[name].write_bytes(b"GGUF" + name.encode())
    monkeypatch.setattr(packages, "package_file", weights.__getitem__)
    for name in ("train.json", "dev.json", "wiki.txt"):
        (tmp_path / name).write_text(name)
    data = f"{tmp_path}/train.json+{tmp_path}/dev.json[:24]"
    options = ["--data", data, "--eval-data", f"{tmp_path}/dev.json[24:]", "--no-wheels"]
    options += ["--continuation", f"text={tmp_path}/wiki.txt"]
    files, out = tmp_path / "files", tmp_path / "out"
    assert gpu_real.main(["pack", str(files), *options]) == 0
    plan = json.loads((files / "plan.json").read_text())
    assert plan["data"] == "train.json+dev.json[:24]"

    commands: list[list[str]] = []

    def fake_run(words: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        commands.append(words)
        (out / "run" / "eval").mkdir(parents=True)
        (out / "run" / "eval" / "report.md").write_text("report")
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(subprocess, "run", fake_run)
    assert (
        gpu_real.main(["run", str(files), str(out), "--minutes", "3", "--rest", "--seed", "5"]) == 0
    )
    (words,) = commands
    assert words[:4] == [sys.executable, "-m", "latentwire_fast.train", "squad_small"]
    given = dict(zip(words[4::2], words[5::2], strict=True))
    brought = files / "data"
    assert given["--data"] == f"{brought}/train.json+{brought}/dev.json[:24]"
    assert given["--eval-data"] == f"{brought}/dev.json[24:]"
    assert given["--set"] == f'evaluation.continuation={{"source": "text={brought}/wiki.txt"}}'
    assert (given["--minutes"], given["--seed"], given["--device"]) == ("3.0", "5", "cuda")
    for name, source in gpu_real.READERS.items():
        path = out / "weights" / weights[source].name
        assert f"{name}={path}" in words
        assert path.read_bytes() == weights[source].read_bytes()
    with tarfile.open(out / "all.tar.gz") as archive:
        assert "eval/report.md" in archive.getnames()
    (files / "weights" / "smollm2.gguf.00").unlink()
    (out / "weights" / "smollm2.gguf").unlink()
    assert gpu_real.main(["run", str(files), str(out)]) == 2
