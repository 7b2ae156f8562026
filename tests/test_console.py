"""The command `latentwire`: what it lists, whom it calls, and what a shell completes."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from latentwire_fast import __main__ as console
from latentwire_fast import __version__
from latentwire_fast.__main__ import SHELLS, completion_script, options
from test_architecture import FLOORS

KINDS = {name.replace("_", "-"): console.arguments_of(name) for name in console.COMMANDS}


def said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str
) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `latentwire WORDS`."""
    monkeypatch.setattr(sys, "argv", ["latentwire", *words])
    status = 0
    try:
        console.main()
    except SystemExit as stop:
        status = int(stop.code or 0)
    return status, *capsys.readouterr()


def completed(line: str) -> list[str]:
    """What bash offers for the last word of a line, files left out."""
    words = " ".join(f'"{word}"' for word in line.split(" "))
    code = f"COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}}-1)); _latentwire"
    code = f'{completion_script("bash")}\n{code}; echo "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_every_entry_point_is_a_command() -> None:
    assert set(console.COMMANDS) == set(FLOORS[-2].split())
    scripts = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    module, _, function = scripts["scripts"]["latentwire"].partition(":")
    assert getattr(importlib.import_module(module), function) is console.main


def test_the_help_lists_every_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, output, _ = said(capsys, monkeypatch, "--help")
    assert status == 0
    for name in KINDS:
        assert f"\n  {name} " in output
    assert (
        "\n  encode           Write the payload of a context, or those of many passages.\n"
        in output
    )
    assert said(capsys, monkeypatch) == (2, output, "")
    assert said(capsys, monkeypatch, "--version") == (0, f"latentwire {__version__}\n", "")


@pytest.mark.parametrize("name", KINDS)
def test_a_command_is_the_module_of_its_name(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module(f"latentwire_fast.{name.replace('-', '_')}")
    monkeypatch.setattr(module, "main", lambda: print(sys.argv))  # noqa: T201
    output = said(capsys, monkeypatch, name, "--run", "x")[1]
    assert output == f"{[f'latentwire {name}', '--run', 'x']}\n"


def test_a_command_names_itself_as_it_was_called(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, output, _ = said(capsys, monkeypatch, "evaluate", "score", "--help")
    assert status == 0
    assert output.startswith("usage: latentwire evaluate score ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "error: no command 'trian'; there are train, evaluate, "),
        (["completion"], "error: completion takes the name of a shell: bash or zsh"),
        (["completion", "fish"], "error: completion takes the name of a shell: bash or zsh"),
        (["encode", "--run", "no", "--context", "no.txt", "--out", "x"], "error: no.txt: No such"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    status, output, errors = said(capsys, monkeypatch, *words)
    assert (status, output) == (2, "")
    assert errors.startswith(message)
    assert len(errors.splitlines()) == 1


def test_options_are_those_of_the_help(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, kind in KINDS.items():
        usage = said(capsys, monkeypatch, name, "--help")[1]
        for option in dict(options(kind)):
            assert f" {option} " in usage, name


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("latentwire tr", ["train", "train-text-lora"]),
        ("latentwire train x --mo", ["--mode"]),
        ("latentwire train x --mode ", ["context", "pure"]),
        ("latentwire repack --prior f", ["flat"]),
        ("latentwire encode --co", ["--context"]),
        ("latentwire encode --context ", []),  # the shell offers files
        ("latentwire completion ", [*SHELLS]),
    ],
)
def test_bash_completes(line: str, offered: list[str]) -> None:
    assert completed(line) == offered


@pytest.mark.skipif(shutil.which("zsh") is None, reason="there is no zsh here")
def test_zsh_reads_its_script() -> None:
    code = completion_script("zsh") + "whence -w _latentwire"
    done = subprocess.run(["zsh", "-f", "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("_latentwire: function\n", "")


def test_a_reader_that_ends_early_is_no_error() -> None:
    """As in `latentwire --help | head -1`."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "latentwire_fast", "--help"]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], stdout=writing, stderr=subprocess.PIPE, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")
