"""Is it collapsing? The measures of latents that do and do not, and their page of the report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import latentwire_fast as lw
from latentwire_fast.config.presets import weighted
from latentwire_fast.config.schema import DataConfig, StageConfig
from latentwire_fast.evaluation.report.collapse import collapse_view
from latentwire_fast.evaluation.spread import variance_shares
from latentwire_fast.readers.embeddings import nearest_tokens
from runs import deep, soft, tiny_config


def test_the_spectrum_of_a_covariance() -> None:
    axes = torch.diag(torch.tensor([3.0, 1.0]))
    rows = torch.cat([axes, -axes])[:, None]
    assert variance_shares(rows + 5.0) == pytest.approx([0.9, 0.1])
    assert variance_shares(torch.ones(4, 2, 3)) == []
    assert variance_shares(torch.randn(1, 2, 3)) == []


def test_the_nearest_tokens_are_those_of_the_largest_cosine() -> None:
    embedding = torch.nn.Embedding(50, 8)
    table = embedding.weight.detach()
    ids, cosines = nearest_tokens(3.0 * table[[7, 0, 49]], embedding)
    assert ids.tolist() == [7, 0, 49]
    torch.testing.assert_close(cosines, torch.ones(3))
    row = torch.randn(1, 8)
    expected = torch.nn.functional.cosine_similarity(row, table).argmax()
    assert nearest_tokens(row, embedding)[0].item() == expected


@pytest.mark.usefixtures("on_the_cpu")
def test_an_evaluation_says_whether_it_is_collapsing(llama_folder: Path, tmp_path: Path) -> None:
    config = tiny_config(
        llama_folder,
        attachments=(soft(expansion=1), deep(width=16, heads=2, layers=1)),
        stages=(StageConfig("answer", steps=1, objectives=weighted(answer=1.0)),),
        data=DataConfig(facts=2, eval_examples=8),
    )
    metrics = lw.train(config, tmp_path, progress=False)
    assert metrics is not None
    found: dict[str, Any] = metrics["collapse"]
    assert 2 <= found["texts"] <= 8
    assert 0 < found["latent"]["effective_rank"] <= found["texts"] - 1
    assert sum(found["latent"]["variance_shares"]) == pytest.approx(1.0)
    reader = found["readers"]["llama"]
    assert set(reader["rms"]) == {"soft_tokens", "keys", "values"}
    assert sum(reader["rms"]["soft_tokens"]["counts"]) == 4 * found["texts"]
    assert reader["rms"]["soft_tokens"]["median"] == pytest.approx(1.0, abs=1e-3)
    assert -1 <= reader["nearest"]["cosine"] <= 1
    assert math.isfinite(reader["first_tokens"]["margin"])
    assert reader["first_tokens"]["predicted_entropy"] > 0
    assert 0 <= reader["first_tokens"]["entropy"] <= math.log(8) + 1e-9
    assert sum(share for _, share in reader["first_tokens"]["commonest"]) <= 1 + 1e-9
    json.dumps(found, allow_nan=False)
    for name in ("report.md", "report.html"):
        page = (tmp_path / "eval" / name).read_text()
        assert "Is it collapsing?" in page
        assert "First tokens that it predicts" in page


def collapsed() -> dict[str, Any]:
    """Metrics in which everything has collapsed."""
    spread = {"pairwise_cosine": 0.999, "effective_rank": 1.2, "variance_shares": [0.99, 0.01]}
    return {
        "collapse": {
            "texts": 40,
            "latent": spread,
            "readers": {
                "llama": {
                    "rms": {},
                    "prefix": spread,
                    "nearest": {"cosine": 0.9, "distinct": 0.1, "commonest": [["the", 0.8]]},
                    "empty_rate": 0.25,
                    "first_tokens": {"distinct": 1, "entropy": 0.0, "commonest": [[" 9|4", 1.0]]},
                    "gold_first_tokens": {
                        "distinct": 20,
                        "entropy": 3.0,
                        "commonest": [[" a", 0.1]],
                    },
                }
            },
        }
    }


def test_signs_of_a_collapse_are_said() -> None:
    view = collapse_view(collapsed())
    assert view is not None
    text = "\n".join(view["signs"])
    assert "payloads of different texts have effective rank 1.2" in text
    assert "soft tokens of llama of two texts have cosine 0.999" in text
    assert "llama begins 100.0% of its answers with ' 9|4'" in text
    assert "25.0% of llama's answers are empty" in text
    rows = {row["label"]: row["cells"] for row in view["rows"]}
    assert rows["Variance in the first direction, %"] == ["99.0", "99.0"]
    assert not any(label.startswith("RMS") for label in rows), "what was not measured is left out"


@pytest.mark.parametrize(("texts", "shown"), [(9, False), (10, True)])
def test_directions_that_hold_everything_anyway_are_left_out(texts: int, shown: bool) -> None:
    metrics = collapsed()
    metrics["collapse"]["texts"] = texts  # which have one direction less
    view = collapse_view(metrics)
    assert view is not None
    assert any("first 8 directions" in row["label"] for row in view["rows"]) == shown


def test_no_page_without_the_measures() -> None:
    assert collapse_view({}) is None
