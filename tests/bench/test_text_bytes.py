"""The bytes of a run's texts in every form, from its configuration alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench.real import text_bytes
from latentwire_fast.config.presets import PRESETS
from latentwire_fast.config.schema import ReaderConfig
from latentwire_fast.config.serialization import to_json


def test_forms_of_the_texts(
    llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    smoke = PRESETS["testbed_smoke"]()
    config = replace(smoke, readers={"llama": ReaderConfig(str(llama_folder))}, mode="context")
    (tmp_path / "config.json").write_text(json.dumps(to_json(config)))
    result = tmp_path / "bytes.json"
    arguments = [str(tmp_path), "--texts", "2", "--sample", "1", "--json", str(result)]
    assert text_bytes.main(arguments) == 0
    found = json.loads(result.read_text())
    entry = found["readers"]["llama"]
    assert found["texts"] == 2
    assert entry["sample_equal"] == 1
    assert entry["lost"] == 0
    assert entry["sample_bytes"][0] == pytest.approx(entry["sample_information"][0], rel=0.5)
    assert found["bytes_mean"]["brotli"] < found["bytes_mean"]["utf8"]
    printed = capsys.readouterr().out
    assert "coded by llama" in printed
    assert "1 equal" in printed


def test_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert text_bytes.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("text_bytes: error: ")
