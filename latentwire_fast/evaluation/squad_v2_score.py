"""SQuAD v2.0's official scores (Rajpurkar et al. 2018): questions that may have no answer.

They differ from v1.1's where a text normalises to nothing: such gold answers are left out, a
question without any has the answer "", and two texts without words are the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from latentwire_fast.data.examples import Example
from latentwire_fast.evaluation.languages import normalize_answer


def golds_of(example: Example) -> list[str]:
    """The answers that count: those with a word, or else `""`."""
    return [a for a in example.answers if normalize_answer(a, example.language)] or [""]


def exact_v2(prediction: str, example: Example) -> float:
    """1.0 if the prediction equals an answer after normalisation, else 0.0."""
    said = normalize_answer(prediction, example.language)
    return float(said in {normalize_answer(a, example.language) for a in golds_of(example)})


def f1_v2(prediction: str, example: Example) -> float:
    """Token-overlap F1 against the best answer, 0..1."""
    said = normalize_answer(prediction, example.language).split()
    return max(
        _overlap(said, normalize_answer(answer, example.language).split())
        for answer in golds_of(example)
    )


def _overlap(said: Sequence[str], gold: Sequence[str]) -> float:
    if not (said and gold):
        return float(said == gold)
    common = (Counter(said) & Counter(gold)).total()
    if common == 0:
        return 0.0
    precision, recall = common / len(said), common / len(gold)
    return 2 * precision * recall / (precision + recall)


def score_v2(
    examples: Sequence[Example],
    answered: Mapping[str, str],
    *,
    no_answer_scores: Mapping[str, float] | None = None,
    threshold: float = 1.0,
) -> dict[str, Any]:
    """The figures of the official script, in percent, by its names.

    Args:
        examples: a question without an answer has the answer `""`.
        answered: by question; one without a prediction is wrong (the script leaves it out).
        no_answer_scores: by question, how sure it is that there is no answer; zero where it is not
            said. Those above `threshold` count as the answer "". With them come the best scores
            that any threshold gives, and that threshold.
    """
    scores = {
        "exact": {e.id: _of(exact_v2, e, answered) for e in examples},
        "f1": {e.id: _of(f1_v2, e, answered) for e in examples},
    }
    has_answer = {e.id: e.answers != ("",) for e in examples}
    sure = no_answer_scores or {}
    result: dict[str, Any] = {}
    for name, of_question in scores.items():
        final = {
            i: float(not has_answer[i]) if sure.get(i, 0.0) > threshold else score
            for i, score in of_question.items()
        }
        result["exact_match" if name == "exact" else name] = _percent(list(final.values()))
        for group, wanted in ("HasAns", True), ("NoAns", False):
            part = [score for i, score in final.items() if has_answer[i] is wanted]
            if part:
                result[f"{group}_{name}"] = _percent(part)
                result[f"{group}_total"] = len(part)
    if no_answer_scores is not None:
        for name, of_question in scores.items():
            best, at = _best_threshold(of_question, answered, no_answer_scores, has_answer)
            result[f"best_{name}"], result[f"best_{name}_thresh"] = best, at
    return result


def _of(score: Any, example: Example, answered: Mapping[str, str]) -> float:
    return score(answered[example.id], example) if example.id in answered else 0.0


def _percent(scores: Sequence[float]) -> float:
    return 100 * sum(scores) / len(scores)


def _best_threshold(
    scores: Mapping[str, float],
    answered: Mapping[str, str],
    no_answer_scores: Mapping[str, float],
    has_answer: Mapping[str, bool],
) -> tuple[float, float]:
    """The best mean score in percent, and the threshold that gives it.

    As the script does it: at first "no answer" to everything, then one question after the other is
    answered, the surest that it has an answer first.
    """
    current = best = float(sum(not has for has in has_answer.values()))
    at = 0.0
    for i in sorted((i for i in no_answer_scores if i in scores), key=no_answer_scores.__getitem__):
        if has_answer[i]:
            current += scores[i]
        elif answered.get(i) != "":
            current -= 1
        if current > best:
            best, at = current, no_answer_scores[i]
    return 100 * best / len(scores), at
