"""Official scores of a predictions file (`python -m latentwire_fast.evaluate score`)."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from latentwire_fast.data.examples import Example
from latentwire_fast.data.squad import load_squad, version_of
from latentwire_fast.errors import DataError
from latentwire_fast.evaluation import metrics
from latentwire_fast.evaluation.languages import warn_of_scripts
from latentwire_fast.evaluation.squad_v2_score import score_v2
from latentwire_fast.files.json_files import read_json

logger = logging.getLogger(__name__)


def score_file(
    data: Path,
    predictions: Path,
    *,
    no_answer_scores: Path | None = None,
    no_answer_threshold: float = 1.0,
    language: str = "en",
) -> dict[str, Any]:
    """Score predictions on every question of a SQuAD file by the official script of its version.

    Args:
        data: a SQuAD v1.1 or v2.0 file.
        predictions: a JSON object, question id to answer text; `""` says "no answer" (v2.0).
        no_answer_scores: v2.0: a JSON object, question id to how sure it is that there is no
            answer; those above the threshold count as the answer `""`.
        language: whose rules compare answers (`languages.py`).

    Returns:
        `exact_match` and `f1` in percent over all questions, `questions`, and `missing`: how many
        have no prediction, which count as wrong. Of v2.0 also `HasAns_*` and `NoAns_*`, and with
        scores `best_*`, by the script's names.

    Raises:
        DataError: a malformed file, predictions for none of the questions, or no-answer scores for
            a v1.1 file.
    """
    examples = [replace(e, language=language) for e in load_squad(data, no_answer="")]
    warn_of_scripts(examples, source=str(data))
    answered = _read_by_question(predictions, str, "answer text")
    missing = sum(e.id not in answered for e in examples)
    if missing == len(examples):
        raise DataError(
            f"{predictions}: has no prediction for any of the {len(examples)} questions of {data}; "
            "do the two belong together?"
        )
    if missing:
        logger.warning("%d of %d questions have no prediction: wrong", missing, len(examples))
    if version_of(data) == 2:
        sure = None
        if no_answer_scores is not None:
            sure = _read_by_question(no_answer_scores, float, "number")
        result = score_v2(examples, answered, no_answer_scores=sure, threshold=no_answer_threshold)
    elif no_answer_scores is not None:
        raise DataError(f"{data}: is a v1.1 file, whose questions all have answers")
    else:
        result = _score_v1(examples, answered)
    return {**result, "questions": len(examples), "missing": missing}


def _score_v1(examples: Sequence[Example], answered: dict[str, str]) -> dict[str, Any]:
    scored = [e for e in examples if e.id in answered]
    exact = sum(metrics.exact_match(answered[e.id], e.answers, e.language) for e in scored)
    overlap = sum(metrics.f1(answered[e.id], e.answers, e.language) for e in scored)
    return {"exact_match": 100 * exact / len(examples), "f1": 100 * overlap / len(examples)}


def _read_by_question(path: Path, kind: type, words: str) -> dict[str, Any]:
    """A JSON object of question id to text, or to a number."""
    values = read_json(path, error=DataError)
    if not isinstance(values, dict):
        raise DataError(
            f"{path}: is a JSON {type(values).__name__}; expected one object, "
            f'{{"question id": "{words}"}}'
        )
    kinds = (int, float) if kind is float else (kind,)
    for identifier, value in values.items():
        if isinstance(value, bool) or not isinstance(value, kinds):
            what = "prediction" if kind is str else "no-answer score"
            raise DataError(
                f"{path}: the {what} for {identifier!r} is {type(value).__name__}, "
                f"expected {'text' if kind is str else 'a number'}"
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise DataError(f"{path}: the no-answer score for {identifier!r} is {value}")
    return values
