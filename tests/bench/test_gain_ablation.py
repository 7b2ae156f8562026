"""Soft tokens at several gains: what is learned, and what the numbers are of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.real import gain_ablation
from bench.real.gain_ablation import ablate, learn, parse, passages, table
from latentwire_fast.readers.reader import Reader

ARGUMENTS = [
    "testbed:llama",
    "--texts",
    "1",
    "--latents",
    "3",
    "--steps",
    "12",
    "--gains",
    "1",
    "9",
]


def test_learned_tokens_have_the_embeddings_loudness(readers: dict[str, Reader]) -> None:
    args, reader = parse(ARGUMENTS), readers["llama"]
    (passage,) = passages(reader, args)
    for gain in (0.5, 4.0):
        tokens_MD = learn(reader, passage, gain=gain, args=args)
        rms_M = tokens_MD.pow(2).mean(-1).sqrt()
        assert rms_M.tolist() == pytest.approx([reader.embedding_rms] * 3)
    again = learn(reader, passage, gain=4.0, args=args)
    assert again.equal(tokens_MD)


def test_a_table_of_gains(readers: dict[str, Reader]) -> None:
    args = parse(ARGUMENTS)
    result = ablate(readers["llama"], args)
    assert result["scaled"]["1"] == result["learned"]["1"]
    untrained = ablate(readers["llama"], parse([*ARGUMENTS, "--steps", "0"]))
    for gain in ("1", "9"):
        assert result["learned"][gain] < untrained["learned"][gain]
    assert untrained["scaled"] == untrained["learned"]
    assert result["text"] == untrained["text"]
    assert "| 9 |" in table(result)


def test_numbers_of_a_real_reader_s_data(
    llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paragraphs = [
        {
            "context": f"Town {c} lies by the river {c}.",
            "qas": [
                {"id": f"{c}-{q}", "question": f"Which {q}?", "answers": [{"text": f"river {c}"}]}
                for q in range(5)
            ],
        }
        for c in range(2)
    ]
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"data": [{"title": "T", "paragraphs": paragraphs}]}))
    words = [str(llama_folder), *ARGUMENTS[1:], "--data", str(path)]
    assert gain_ablation.main([*words, "--json", str(tmp_path / "gain.json")]) == 0
    result = json.loads((tmp_path / "gain.json").read_text())
    assert set(result["learned"]) == {"1", "9"}
    assert gain_ablation.main([*words, "--texts", "3"]) == 2
    assert "2 contexts with four questions, 3 asked for" in capsys.readouterr().err
