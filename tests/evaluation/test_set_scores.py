"""Scores of each set of a mixture: in metrics.json, in the terminal and in the report."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from latentwire_fast.config.presets import PRESETS
from latentwire_fast.config.schema import DataConfig, RunConfig
from latentwire_fast.data.examples import Example
from latentwire_fast.evaluation.console import summary_lines
from latentwire_fast.evaluation.metrics import rouge
from latentwire_fast.evaluation.report import write_report
from latentwire_fast.evaluation.scoring import judge_answers
from latentwire_fast.evaluation.set_scores import set_scores


def config_of(*, source: str) -> RunConfig:
    config = PRESETS["testbed_context"]()
    evaluation = replace(config.evaluation, resamples=20)
    return replace(config, data=DataConfig(source), evaluation=evaluation)


def example(name: str, number: int, answer: str) -> Example:
    return Example(f"{name}/{number}", f"c{number}", "?", (answer,), set_name=name)


@pytest.fixture
def mixture(tmp_path: Path) -> tuple[str, list[Example]]:
    """A SQuAD file, MMLU and XSum."""
    for file in ("dev.json", "maths_test.csv", "news.csv"):
        (tmp_path / file).touch()
    spec = f"{tmp_path}/dev.json@2,mmlu={tmp_path}/maths_test.csv,xsum={tmp_path}/news.csv"
    examples = [
        example("dev", 0, "the red lamp"),
        example("dev", 1, "tea"),
        example("maths_test", 2, "A"),
        example("maths_test", 3, "the"),
        example("news", 4, "a red lamp was lit"),
    ]
    return spec, examples


def scores_of(spec: str, examples: list[Example]) -> dict[str, Any]:
    latent = judge_answers(["lamp", "tea", "a", "an", "a red lamp"], examples)
    text = judge_answers(["red lamp", "tea", "A", "the", "a red lamp was lit"], examples)
    return set_scores(config_of(source=spec), examples, {"llama": {"text": text, "latent": latent}})


def test_every_set_has_its_own_scores(mixture: tuple[str, list[Example]]) -> None:
    spec, examples = mixture
    found = scores_of(spec, examples)
    assert {name: (e["metric"], e["examples"], e["contexts"]) for name, e in found.items()} == {
        "dev": ("f1", 2, 2),
        "maths_test": ("accuracy", 2, 2),
        "news": ("rougeL", 1, 1),
    }
    latent = {name: entry["readers"]["llama"]["latent"] for name, entry in found.items()}
    assert latent["dev"]["f1"]["mean"] == pytest.approx((2 / 3 + 1) / 2)
    assert latent["dev"]["em"]["mean"] == 0.5
    assert latent["maths_test"]["accuracy"]["mean"] == 0.5  # "an" is not "the"
    assert latent["maths_test"]["em"]["mean"] == 1.0  # articles are nothing to SQuAD's rules
    expected = rouge("a red lamp", ["a red lamp was lit"])["rougeL"]
    assert latent["news"]["rougeL"]["mean"] == pytest.approx(expected)
    assert set(latent["dev"]) == {"f1", "em"}


def test_one_set_known_by_its_f1_needs_no_second_table(
    mixture: tuple[str, list[Example]],
) -> None:
    spec, examples = mixture
    parts = spec.split(",")
    assert scores_of(parts[0], examples[:1] * 5) == {}
    assert list(scores_of(parts[2], examples[4:] * 5)) == ["news"]
    assert set_scores(config_of(source="testbed"), [Example("i", "c", "?", ("a",))], {}) == {}


def test_terminal_and_report_show_the_sets(
    mixture: tuple[str, list[Example]], tmp_path: Path
) -> None:
    nothing = {"mean": 0.5, "low": 0.4, "high": 0.6}
    metrics = {
        "run": {"name": "r", "mode": "context"},
        "examples": 5,
        "latent": {"bits": 8},
        "bytes": {"text_utf8_mean": 9, "text_brotli_mean": 9, "payload_mean": {"8": 4}},
        "readers": {"llama": {"text": {"f1": nothing}, "latent": {"f1": nothing}}},
        "hypotheses": {},
        "sets": scores_of(*mixture),
    }
    lines = summary_lines(metrics)
    at = lines.index("maths_test: Accuracy on 2 examples")
    assert lines[at + 1 : at + 3] == [f"  {'text':16}{'100.0':>12}", f"  {'latent':16}{'50.0':>12}"]
    write_report(tmp_path, metrics=metrics, predictions=[], diagnostics=[], config={})
    markdown = (tmp_path / "report.md").read_text()
    table = markdown.partition("### news: ROUGE-L of 1 examples")[2].partition("###")[0]
    assert "| Full text | 100.0 [100.0 to 100.0] |" in table
    assert "news: ROUGE-L of 1 examples" in (tmp_path / "report.html").read_text()
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    found = [r for r in rows if (r["part"], r["metric"]) == ("llama on maths_test", "accuracy")]
    assert [(r["method"], r["mean"]) for r in found] == [("text", "1.0"), ("latent", "0.5")]
