"""Objectives over the answers' tokens against plain formulas on whole logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from latentwire_fast.errors import ConfigError
from runs import soft
from stage_batches import StageBatch, assert_cut_alike, objective


@pytest.fixture(scope="module", params=["context", "pure"])
def batch(request: pytest.FixtureRequest, llama_folder: Path, qwen_folder: Path) -> StageBatch:
    parts = (soft("linear"),)
    return StageBatch.of(llama_folder, qwen_folder, mode=request.param, attachments=parts)


def answer_logits(batch: StageBatch, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels and places in the answer of every token behind the latents."""
    answers = batch.reader_batch(name, objective("answer")).answers
    logits_NV = batch.readers[name].output_head.logits(answers.hidden_ND)
    return logits_NV, answers.batch.labels_N, answers.batch.step_N


@torch.no_grad()
def test_label_smoothing_is_the_naive_one(batch: StageBatch) -> None:
    losses = batch.compute(objective("answer", tokens=2, label_smoothing=0.1))[0]
    for name in batch.readers:
        logits_NV, labels_N, step_N = answer_logits(batch, name)
        kept_N = step_N < 2
        expected = F.cross_entropy(
            logits_NV[kept_N], labels_N[kept_N], label_smoothing=0.1, reduction="sum"
        )
        torch.testing.assert_close(losses.sums["answer", name], expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("auto_scale", [0.0, 2.0])
def test_first_tokens_scale_themselves(batch: StageBatch, auto_scale: float) -> None:
    config = objective("first_token", auto_scale=auto_scale)
    losses = batch.compute(config)[0]
    for name in batch.readers:
        logits_NV, labels_N, step_N = answer_logits(batch, name)
        log_n = -F.cross_entropy(logits_NV, labels_N, reduction="none")[step_N == 0]
        weights_n = (1 - log_n.exp()) ** auto_scale
        expected = -(weights_n * log_n).sum()
        torch.testing.assert_close(losses.sums["first_token", name], expected, rtol=1e-4, atol=0)
        scale = losses.measures.get(("first_token_scale", name))
        assert (scale is None) == (auto_scale == 0)
        if scale is not None:
            assert scale.item() == pytest.approx(weights_n.mean().item(), rel=1e-4)
    assert_cut_alike(batch, config, objective("answer"))


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("answer", {"label_smoothing": 1.0}, r"label_smoothing=1.0, expected in \[0, 1\)"),
        ("first_token", {"auto_scale": -1.0}, "auto_scale=-1.0, expected at least 0"),
    ],
)
def test_settings_are_checked(kind: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        objective(kind, **settings)
