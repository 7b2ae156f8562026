"""A reader's own positions: a few of them hold the answers, one does not; a command prints them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import own_positions


def test_a_few_of_its_own_positions_are_enough_for_a_reader(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = tmp_path / "found.json"
    options = ["--passages", "5", "--positions", "1", "12", "--json", str(result)]
    assert own_positions.main(["--reader", "qwen=testbed:qwen", *options]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    found = json.loads(result.read_text())["qwen"]
    right = {way: row["answers right"] for way, row in found.items()}
    assert right["the text"] >= 80
    assert right["12 positions"] >= 80  # of 20 questions
    assert right["1 positions"] <= 40


def test_a_reader_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert own_positions.main(["--reader", "none=testbed:none"]) == 2
    assert capsys.readouterr().err.startswith("own_positions: error: ")
