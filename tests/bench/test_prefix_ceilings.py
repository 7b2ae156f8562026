"""The ceilings of deep prefixes: what is equal to the text is equal, and the rest is a number."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import prefix_ceilings
from runs import tiny_squad


def test_all_of_a_text_in_its_place_is_the_text(
    llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tiny_squad(tmp_path / "data.json", passages=4)
    prefix_ceilings.main([str(llama_folder), str(data), "--contexts", "2", "--latents", "3"])
    lines = (line.rsplit(None, 1) for line in capsys.readouterr().out.splitlines())
    found = {name.strip(): float(value) for name, value in lines}
    assert found["all, in place"] == pytest.approx(found["the text"], abs=2e-3)
    assert len(found) == 6
