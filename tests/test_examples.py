"""The scripts and the notebook of examples/, on a run of six steps: they work, their answers mean
nothing."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

import latentwire_fast as lw
from latentwire_fast.registry import ADAPTERS
from runs import store

pytestmark = pytest.mark.usefixtures("on_the_cpu")

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = ("encode_and_answer", "add_a_reader", "long_text", "own_part")
LONGER = ("retrieval", "retrieval_corpus")  # tests/test_retrieval_example.py
NOTEBOOK = EXAMPLES / "quickstart.ipynb"


def example(name: str) -> ModuleType:
    """A script of the folder as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> str:
    """In the place of the preset: six steps, with one reader too."""
    config = lw.load_preset("testbed_smoke")
    readers = lw.load_preset("testbed_quick").readers
    folder = tmp_path_factory.mktemp("preset")
    return str(store(replace(config, readers=readers), folder / "smoke.json"))


@pytest.fixture(scope="module")
def run(smoke: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished run."""
    folder = tmp_path_factory.mktemp("examples") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        example("encode_and_answer").main(folder, smoke)
        yield folder


def test_every_script_is_listed_and_short() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*SCRIPTS, *LONGER}
    for name in SCRIPTS:
        assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 60, name


def test_encode_and_answer(run: Path, smoke: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a finished run nothing is trained again."""
    module = example("encode_and_answer")
    module.main(run, smoke)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(module.FACTS)
    assert all(line.startswith("42 bytes: ") for line in lines)


def test_add_a_reader(
    run: Path, smoke: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example("add_a_reader").main(run, tmp_path / "more", smoke)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("llama reads 42 bytes: ")
    assert second.startswith("qwen reads 42 bytes: ")


def test_long_text(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example("long_text").main(run)
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r"[2-4] payloads, \d+ bytes for \d+ bytes of text$", lines[0])
    assert len(lines) == 3


def test_own_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ADAPTERS, "_added", {})
    example("own_part").main(tmp_path / "own")
    assert capsys.readouterr().out == "trained, saved and loaded: True\n"


def test_the_notebook(
    run: Path,
    smoke: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its code runs, cell by cell; what is stored beside it came from a real run."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quick").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lw, "load_preset", {"testbed_quick": lw.load_preset(smoke)}.__getitem__)
    cells = [c for c in json.loads(NOTEBOOK.read_text())["cells"] if c["cell_type"] == "code"]
    names: dict[str, object] = {}
    for cell in cells:
        exec("".join(cell["source"]), names)
    printed = capsys.readouterr().out
    stored = "".join(
        text for cell in cells for output in cell["outputs"] for text in output.get("text", ())
    )
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    assert len(printed.splitlines()) == len(stored.splitlines())
    assert NOTEBOOK.stat().st_size < 100_000


def test_the_quick_preset_has_one_reader_and_short_texts() -> None:
    config = lw.load_preset("testbed_quick")
    assert (list(config.readers), config.data.facts, config.mode) == (["llama"], 2, "context")
    assert config.total_steps == 240
