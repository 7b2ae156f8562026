"""The official score of a predictions file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from latentwire_fast.errors import DataError
from latentwire_fast.evaluation.squad_score import score_file
from real_files import real_file

QUESTIONS = {"q1": ["red lamp"], "q2": ["1973", "October 1973"], "q3": []}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    qas = [
        {
            "id": i,
            "question": "?",
            "answers": [{"text": t} for t in texts],
            "is_impossible": not texts,
        }
        for i, texts in QUESTIONS.items()
    ]
    path = tmp_path / "dev.json"
    path.write_text(json.dumps({"data": [{"paragraphs": [{"context": "c", "qas": qas}]}]}))
    return path


def write(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


def test_score_by_hand(tmp_path: Path, data: Path) -> None:
    predictions = {"q1": "the red lamp shop", "q2": "October, 1973", "q3": "", "other": "x"}
    result = score_file(data, write(tmp_path / "p.json", predictions))
    assert result["exact_match"] == pytest.approx(100 * 2 / 3)
    assert result["f1"] == pytest.approx(100 * (0.8 + 1 + 1) / 3)
    assert (result["questions"], result["missing"]) == (3, 0)


def test_missing_predictions_are_wrong(
    tmp_path: Path, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = score_file(data, write(tmp_path / "p.json", {"q1": "red lamp"}))
    assert result["exact_match"] == result["f1"] == pytest.approx(100 / 3)
    assert result["missing"] == 2
    assert "2 of 3 questions have no prediction" in caplog.text


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        ({}, "no prediction for any of the 3 questions"),
        ({"elsewhere": "x"}, "do the two belong together"),
        (["red lamp"], "JSON list; expected one object"),
        ({"q1": 3}, "prediction for 'q1' is int, expected text"),
    ],
)
def test_bad_predictions(tmp_path: Path, data: Path, predictions: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        score_file(data, write(tmp_path / "p.json", predictions))


def test_bad_files(tmp_path: Path, data: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        score_file(data, tmp_path / "none.json")
    with pytest.raises(DataError, match="no such file"):
        score_file(tmp_path / "none.json", data)


def test_published_baseline() -> None:
    """A published baseline, where a copy is at hand: official EM 39.8653, F1 51.1883."""
    data = real_file("squad_v1.1_dev_32_articles.json")
    predictions = real_file("squad_predictions_logistic_regression.json")
    result = score_file(data, predictions)
    assert result["exact_match"] == pytest.approx(39.8653, abs=5e-5)
    assert result["f1"] == pytest.approx(51.1883, abs=5e-5)
