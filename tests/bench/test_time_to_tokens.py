"""The table of times to n tokens has a row for each engine of the machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.prefill import time_to_tokens


def test_a_table_of_the_engines(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    sizes = ["--batch", "2", "--text-tokens", "20", "--tokens", "1", "3"]
    time_to_tokens.main(["--reader", "llama-tiny", *sizes, "--warm-ups", "0", "--runs", "2",
                         "--json", str(tmp_path / "times.json")])  # fmt: skip
    name, heads, _, *rows = capsys.readouterr().out.splitlines()
    assert name.startswith("llama-tiny, batch 2, 20 tokens of text, on ")
    assert heads == "| engine | 1 tokens, ms | 3 tokens, ms |"
    assert rows[0].startswith("| eager | ")
    found = json.loads((tmp_path / "times.json").read_text())
    assert (found["batch"], set(found["ms"]["eager"])) == (2, {"1", "3"})
    assert all(float(cell) > 0 for cell in rows[0].split("|")[2:4])
