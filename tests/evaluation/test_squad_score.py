"""The official score of a predictions file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from latentwire_fast import cli
from latentwire_fast.config import parts
from latentwire_fast.config.schema import DataConfig
from latentwire_fast.data.sources import load_examples
from latentwire_fast.data.squad import load_squad
from latentwire_fast.errors import ConfigError, DataError
from latentwire_fast.evaluation.languages import normalize_answer
from latentwire_fast.evaluation.scoring import judge_answers
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


# --- version 2 ------------------------------------------------------------------------------------


def squad_file(path: Path, golds: dict[str, list[str]], version: str) -> Path:
    qas = []
    for identifier, texts in golds.items():
        record = {"id": identifier, "question": "?", "answers": [{"text": t} for t in texts]}
        qas.append(record | ({"is_impossible": not texts} if version == "v2.0" else {}))
    paragraphs = [{"context": "c", "qas": qas}]
    return write(path, {"version": version, "data": [{"paragraphs": paragraphs}]})


@pytest.mark.parametrize(
    ("gold", "prediction", "version_1", "version_2"),
    [
        ("A", "A", (100, 0), (100, 100)),  # F6: v2.0 compares token lists, empty with empty
        ("a", "an", (100, 0), (100, 100)),
        ("the", ".", (100, 0), (100, 100)),  # F24
        (".", "lamp", (0, 0), (0, 0)),
        ("the lamp", "lamp", (100, 100), (100, 100)),
        ("red lamp", "lamp", (0, 200 / 3), (0, 200 / 3)),
        ("lamp", "", (0, 0), (0, 0)),
    ],
)
def test_the_script_of_the_files_version(
    tmp_path: Path,
    gold: str,
    prediction: str,
    version_1: tuple[float, float],
    version_2: tuple[float, float],
) -> None:
    """Values as the two official scripts give them."""
    said = write(tmp_path / "p.json", {"q": prediction})
    for version, expected in (("1.1", version_1), ("v2.0", version_2)):
        result = score_file(squad_file(tmp_path / "d.json", {"q": [gold]}, version), said)
        assert (result["exact_match"], result["f1"]) == pytest.approx(expected)


def test_golds_without_a_word_are_left_out_in_v2(tmp_path: Path) -> None:
    """Beside another gold, "the" is no answer any more."""
    data = squad_file(tmp_path / "d.json", {"q": ["the", "lamp"]}, "v2.0")
    result = score_file(data, write(tmp_path / "p.json", {"q": "the"}))
    assert (result["exact_match"], result["f1"]) == (0, 0)


def test_questions_without_an_answer(tmp_path: Path) -> None:
    golds = {"a": ["red lamp"], "b": ["tea"], "c": [], "d": []}
    data = squad_file(tmp_path / "d.json", golds, "v2.0")
    said = write(tmp_path / "p.json", {"a": "lamp", "b": "tea", "c": "", "d": "x"})
    result = score_file(data, said)
    assert result == pytest.approx(
        {
            "exact_match": 50,
            "f1": 100 * (2 / 3 + 1 + 1) / 4,
            "HasAns_exact": 50,
            "HasAns_f1": 100 * (2 / 3 + 1) / 2,
            "HasAns_total": 2,
            "NoAns_exact": 50,
            "NoAns_f1": 50,
            "NoAns_total": 2,
            "questions": 4,
            "missing": 0,
        }
    )
    sure = write(tmp_path / "na.json", {"a": 0.2, "b": 0.1, "c": 0.3, "d": 0.9})
    best = score_file(data, said, no_answer_scores=sure)
    # answer b, then a: exact 2 + 1 + 0, F1 2 + 1 + 2/3; then d, which is wrong
    assert [best[f"best_{n}"] for n in ("exact", "f1")] == pytest.approx(
        [75, 100 * (3 + 2 / 3) / 4]
    )
    assert (best["best_exact_thresh"], best["best_f1_thresh"]) == (0.1, 0.2)
    assert best["f1"] == result["f1"]  # a threshold of 1 changes nothing
    at = score_file(data, said, no_answer_scores=sure, no_answer_threshold=0.15)
    assert (at["exact_match"], at["NoAns_f1"], at["HasAns_f1"]) == (75, 100, 50)


def test_bad_no_answer_scores(tmp_path: Path) -> None:
    data = squad_file(tmp_path / "d.json", {"q": ["tea"]}, "1.1")
    said = write(tmp_path / "p.json", {"q": "tea"})
    sure = write(tmp_path / "na.json", {"q": "0.5"})
    with pytest.raises(DataError, match=r"is a v1\.1 file, whose questions all have answers"):
        score_file(data, said, no_answer_scores=sure)
    data = squad_file(tmp_path / "d.json", {"q": ["tea"]}, "v2.0")
    with pytest.raises(DataError, match="no-answer score for 'q' is str, expected a number"):
        score_file(data, said, no_answer_scores=sure)


def test_real_file_of_version_2(tmp_path: Path) -> None:
    """Nobody answers: right where there is no answer (3,168 of 6,078)."""
    data = real_file("squad_v2.0_dev_half_6078.json.xz")
    ids = [example.id for example in load_squad(data)]
    said = write(tmp_path / "p.json", dict.fromkeys(ids, ""))
    result = score_file(data, said)
    assert result["exact_match"] == result["f1"] == pytest.approx(100 * 3168 / 6078)
    assert (result["NoAns_exact"], result["HasAns_f1"]) == (100, 0)


# --- languages ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("language", "gold", "prediction", "exact", "overlap"),
    [
        ("de", "die Hypothese", "Hypothese", 100, 100),
        ("en", "die Hypothese", "Hypothese", 0, 200 / 3),
        ("de", "„der Kreis“", "Kreis", 100, 100),
        ("zh", "北京大学", "北京", 0, 200 / 3),
        ("en", "北京大学", "北京", 0, 0),
        ("zh", "约 50 米", "50米", 0, 80),  # characters, and numbers as words
        ("es", "la casa", "casa", 100, 100),
        ("vi", "cái nhà", "nhà", 100, 100),
        ("ar", "البيت", "بيت", 100, 100),
        ("hi", "घर।", "घर", 100, 100),
    ],
)
def test_rules_of_languages(
    tmp_path: Path, language: str, gold: str, prediction: str, exact: float, overlap: float
) -> None:
    """As MLQA's script has them."""
    data = squad_file(tmp_path / "d.json", {"q": [gold]}, "1.1")
    result = score_file(data, write(tmp_path / "p.json", {"q": prediction}), language=language)
    assert (result["exact_match"], result["f1"]) == pytest.approx((exact, overlap))


def test_every_language_has_rules() -> None:
    assert get_args(parts.Language) == get_args(cli.Language)
    for language in get_args(parts.Language):
        assert normalize_answer("Tea, ", language) == "tea"


def test_english_rules_on_another_script_warn(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = squad_file(tmp_path / "d.json", {"q": ["北京大学"], "r": ["tea"]}, "1.1")
    said = write(tmp_path / "p.json", {"q": "北京"})
    score_file(data, said, language="zh")
    assert "another script" not in caplog.text
    score_file(data, said)
    assert "1 of 2 answers are in another script, such as '北京大学'" in caplog.text


def test_a_run_compares_by_the_rules_of_its_language(tmp_path: Path) -> None:
    data = squad_file(tmp_path / "d.json", {"q": ["die Hypothese"]}, "1.1")
    for language, score in (("de", 1.0), ("en", 0.0)):
        settings = DataConfig(str(data), language=language)  # type: ignore[arg-type]
        (example,) = load_examples(str(data), split="all", count=None, seed=0, data=settings)
        assert judge_answers(["Hypothese"], [example]).em == [score]
    with pytest.raises(ConfigError, match="language='fr', expected 'en' or"):
        DataConfig(language="fr")  # type: ignore[arg-type]
