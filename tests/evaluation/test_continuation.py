"""Running text: second halves of paragraphs, given the first in several ways."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from latentwire_fast.config.schema import ContinuationConfig, EvalConfig, RunConfig
from latentwire_fast.data.sources import load_examples
from latentwire_fast.errors import ConfigError, DataError
from latentwire_fast.evaluation import continuation
from latentwire_fast.evaluation.console import summary_lines
from latentwire_fast.evaluation.continuation import (
    WAYS,
    continuation_texts,
    measure_continuation,
)
from latentwire_fast.evaluation.report import metrics_csv
from latentwire_fast.evaluation.report.differences import continuation as shown
from latentwire_fast.objectives.continuation import halves
from latentwire_fast.readers.reader import Reader
from latentwire_fast.training.builders import absolute_paths, build_data
from readers import tiny_interlingua
from runs import tiny_config, weighted_stage

WORDS = """Nulnak Tirmel works lives baker smith Ostra every morning in the of and red
lamp""".split()  # noqa: SIM905


@pytest.fixture
def prose(tmp_path: Path) -> Path:
    """Paragraphs of 12 to 19 words, no two of one beginning."""
    path = tmp_path / "prose.txt"
    lines = [" ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 13 + i)) for i in range(1, 8)]
    path.write_text("\n\n".join(lines))
    return path


@pytest.fixture
def config(llama_folder: Path, qwen_folder: Path, prose: Path) -> RunConfig:
    config = tiny_config(llama_folder, qwen_folder)
    settings = ContinuationConfig(f"text={prose}", examples=5)
    evaluation = EvalConfig(continuation=settings, batch_size=2, resamples=50)
    stages = (weighted_stage("answer", 1, answer=1.0),)
    return replace(config, evaluation=evaluation, stages=stages)


@pytest.fixture
def texts(prose: Path) -> list[str]:
    return prose.read_text().split("\n\n")


def test_every_way_predicts_the_same_tokens(
    config: RunConfig,
    readers: dict[str, Reader],
    texts: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_interlingua(readers, "context")
    found = measure_continuation(texts, model, readers, config)
    assert found["examples"] == len(texts)
    assert set(found["readers"]) == set(readers)
    for name, entry in found["readers"].items():
        nll, minus = entry["nll_per_token"], entry["latent_minus"]
        assert set(nll) == {*WAYS}
        assert set(minus) == {*WAYS} - {"latent"}
        for way, interval in minus.items():
            difference = nll["latent"]["mean"] - nll[way]["mean"]
            assert interval["mean"] == pytest.approx(difference)
            assert interval["low"] <= interval["mean"] <= interval["high"]
        reader = readers[name]
        counts = [len(reader.prompts.answer_ids(halves(text)[1])) for text in texts]
        assert entry["scored_tokens_mean"] == pytest.approx(sum(counts) / len(counts))
    monkeypatch.setattr(continuation, "PASS_LOGITS", 1)  # one paragraph at a time
    alone = measure_continuation(texts, model, readers, config)
    for name, entry in found["readers"].items():
        for way, interval in entry["nll_per_token"].items():
            one = alone["readers"][name]["nll_per_token"][way]["mean"]
            assert interval["mean"] == pytest.approx(one, rel=1e-5)


def test_the_text_is_scored_as_plain_text(
    config: RunConfig, readers: dict[str, Reader], texts: list[str]
) -> None:
    """Against the model itself, on the joined tokens."""
    model = tiny_interlingua(readers, "context")
    found = measure_continuation(texts, model, readers, config)
    for name, reader in readers.items():
        total = count = 0.0
        for text in texts:
            first, rest = halves(text)
            before = reader.prompts.build_context(first).ids
            after = reader.prompts.answer_ids(rest)
            with torch.no_grad():
                logits_TV = reader.model(torch.tensor([before + after])).logits[0]
            logprobs_TV = logits_TV.log_softmax(-1)[len(before) - 1 : -1]
            total -= logprobs_TV.gather(1, torch.tensor(after)[:, None]).sum().item()
            count += len(after)
        nll = found["readers"][name]["nll_per_token"]["text"]["mean"]
        assert nll == pytest.approx(total / count, rel=1e-5)


def test_the_latent_is_its_own_payload_s(
    config: RunConfig, readers: dict[str, Reader], texts: list[str]
) -> None:
    """Without differences between paragraphs, a shuffled payload is the own one; and a model that
    learned to continue gets its token for that."""
    model = tiny_interlingua(readers, "context")
    same = measure_continuation([texts[0], texts[0]], model, readers, config)
    for entry in same["readers"].values():
        assert entry["latent_minus"]["shuffled_latent"]["mean"] == pytest.approx(0.0, abs=1e-6)
    other = measure_continuation(texts, model, readers, config)
    stages = (weighted_stage("pretrain", 1, continuation=1.0),)
    taught = measure_continuation(texts, model, readers, replace(config, stages=stages))
    for name, entry in other["readers"].items():
        assert abs(entry["latent_minus"]["shuffled_latent"]["mean"]) > 1e-4
        latent = taught["readers"][name]["nll_per_token"]
        assert latent["latent"]["mean"] != entry["nll_per_token"]["latent"]["mean"]
        assert latent["text"] == entry["nll_per_token"]["text"]


def test_paragraphs_come_once_and_not_from_the_training(
    config: RunConfig, readers: dict[str, Reader], tmp_path: Path
) -> None:
    passages = [f"Paragraph {i} has some more words." for i in range(30)]
    data = {
        "data": [
            {
                "paragraphs": [
                    {
                        "context": text,
                        "qas": [
                            {"id": f"{i}-{q}", "question": "?", "answers": [{"text": "some"}]}
                            for q in range(3)
                        ],
                    }
                    for i, text in enumerate(passages)
                ]
            }
        ]
    }
    path = tmp_path / "squad.json"
    path.write_text(json.dumps(data))
    settings = ContinuationConfig(str(path), examples=9)
    config = replace(config, evaluation=EvalConfig(continuation=settings))
    found = continuation_texts(config, readers)
    assert len(found) == len(set(found)) == 9
    assert set(found) <= set(passages)
    assert continuation_texts(replace(config, evaluation=EvalConfig()), readers) == []
    run = replace(config, data=replace(config.data, source=str(path)))
    with pytest.raises(DataError, match="contexts of the evaluation"):
        build_data(run, readers)
    with pytest.raises(DataError, match="contexts of the evaluation"):
        continuation_texts(run, readers)  # of a trained run, with --set
    assert load_examples(str(path), split="train", count=None, seed=0)


def test_settings_are_checked(
    config: RunConfig, prose: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="examples=1, expected at least 2"):
        ContinuationConfig("a.txt", examples=1)
    with pytest.raises(ConfigError, match=r"evaluation\.continuation needs mode='context'"):
        replace(config, mode="pure")
    monkeypatch.chdir(prose.parent)
    settings = ContinuationConfig("text=prose.txt")
    run = replace(config, evaluation=EvalConfig(continuation=settings))
    stored = absolute_paths(run).evaluation.continuation
    assert stored is not None
    assert stored.source == f"text={prose}"


def test_report_and_terminal_show_it(
    config: RunConfig, readers: dict[str, Reader], texts: list[str]
) -> None:
    model = tiny_interlingua(readers, "context")
    found = measure_continuation(texts, model, readers, config)
    metrics = {
        "readers": {name: {} for name in readers},
        "bytes": {"payload_mean": {"6": 9.0}, "text_utf8_mean": 1.0, "text_brotli_mean": 1.0},
        "latent": {"bits": 6},
        "examples": 1,
        "run": {"mode": "context"},
        "hypotheses": {},
        "continuation": found,
    }
    part = shown(metrics)
    assert part is not None
    assert [row["label"] for row in part["readers"][0]["rows"]] == [*WAYS.values()]
    nll = found["readers"]["llama"]["nll_per_token"]["nothing"]["mean"]
    assert any("rest | nothing" in line and f"{nll:.3f}" in line for line in summary_lines(metrics))
    assert f"llama,continuation_nothing,nll_per_token,{nll}" in metrics_csv(metrics, {})
    assert math.isfinite(nll)
    assert shown({}) is None
