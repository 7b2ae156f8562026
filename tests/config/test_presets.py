"""Presets as functions and as files: what `--print-config` writes trains the same run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from latentwire_fast import train
from latentwire_fast.config.overrides import with_overrides
from latentwire_fast.config.presets import PRESETS, load_preset
from latentwire_fast.errors import ConfigError
from latentwire_fast.training.trainer import Trainer


def printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *words: str) -> str:
    """Output of the training command for these arguments and `--print-config`."""
    monkeypatch.setattr(sys, "argv", ["train", *words, "--print-config"])
    monkeypatch.setattr(Trainer, "run", lambda self: pytest.fail("trained"))
    train.main()
    return str(capsys.readouterr().out)


@pytest.mark.parametrize("name", PRESETS)
def test_a_printed_preset_is_the_preset(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "mine.json"
    path.write_text(printed(monkeypatch, capsys, name))
    assert load_preset(str(path)) == PRESETS[name]()


def test_overrides_are_printed_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    words = ("--reader", "a=x", "--seed", "5", "--steps", "40", "--mode", "context")
    path = tmp_path / "mine.json"
    path.write_text(printed(monkeypatch, capsys, "testbed", *words))
    assert json.loads(path.read_text())["encoder"]["source"] == "x"
    expected = with_overrides(
        load_preset("testbed"), readers={"a": "x"}, seed=5, steps=40, mode="context"
    )
    assert load_preset(str(path)) == expected


def test_the_preset_at_full_size() -> None:
    config = load_preset("squad_llama_qwen")
    assert {name: reader.source for name, reader in config.readers.items()} == {
        "llama": "meta-llama/Llama-3.1-8B-Instruct",
        "qwen": "Qwen/Qwen2.5-7B-Instruct",
    }
    assert {reader.dtype for reader in config.readers.values()} == {"bfloat16"}
    assert config.encoder.source == "meta-llama/Llama-3.2-1B"
    assert (config.encoder.latents, config.encoder.d_z) == (32, 256)
    assert config.encoder.pooler.kind == "layer_spans"  # type: ignore[attr-defined]
    assert config.data.source == "hub:squad"
    assert config.total_steps == 24_000


def test_an_encoder_without_an_lm_takes_no_other() -> None:
    config = load_preset("testbed_byte")
    assert with_overrides(config, readers={"a": "x"}).encoder == config.encoder
    with pytest.raises(ConfigError, match="encoder 'byte' starts from no LM: leave out --encoder"):
        with_overrides(config, encoder="x")
