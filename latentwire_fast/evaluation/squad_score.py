"""Official EM and F1 of a predictions file (`python -m latentwire_fast.evaluate score`)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from latentwire_fast.data.squad import load_squad
from latentwire_fast.errors import DataError
from latentwire_fast.evaluation import metrics
from latentwire_fast.files.json_files import read_json

logger = logging.getLogger(__name__)


def score_file(data: Path, predictions: Path) -> dict[str, Any]:
    """Score predictions on every question of a SQuAD file by the rules of the official script.

    Args:
        data: a SQuAD v1.1 or v2.0 file.
        predictions: a JSON object, question id to answer text; `""` says "no answer" (v2.0).

    Returns:
        `exact_match` and `f1` in percent over all questions, `questions`, and `missing`: how many
        have no prediction, which count as wrong.

    Raises:
        DataError: a malformed file, or predictions for none of the questions.
    """
    examples = load_squad(data, no_answer="")
    answered = _load_predictions(predictions)
    scored = [e for e in examples if e.id in answered]
    if not scored:
        raise DataError(
            f"{predictions}: has no prediction for any of the {len(examples)} questions of {data}; "
            "do the two belong together?"
        )
    missing = len(examples) - len(scored)
    if missing:
        logger.warning("%d of %d questions have no prediction: wrong", missing, len(examples))
    exact = sum(metrics.exact_match(answered[e.id], e.answers) for e in scored)
    overlap = sum(metrics.f1(answered[e.id], e.answers) for e in scored)
    return {
        "exact_match": 100 * exact / len(examples),
        "f1": 100 * overlap / len(examples),
        "questions": len(examples),
        "missing": missing,
    }


def _load_predictions(path: Path) -> dict[str, str]:
    predictions = read_json(path, error=DataError)
    if not isinstance(predictions, dict):
        raise DataError(
            f"{path}: is a JSON {type(predictions).__name__}; expected one object, "
            '{"question id": "answer text"}'
        )
    for identifier, text in predictions.items():
        if not isinstance(text, str):
            raise DataError(
                f"{path}: the prediction for {identifier!r} is {type(text).__name__}, expected text"
            )
    return predictions
