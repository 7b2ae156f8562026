"""What a run's log says of first tokens, and of each loss's own gradient."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from latentwire_fast.config.presets import weighted
from latentwire_fast.config.schema import StageConfig
from latentwire_fast.errors import ConfigError
from runs import changed, records, soft, tiny_config, train

pytestmark = pytest.mark.usefixtures("on_the_cpu")


def run(folder: Path, run_dir: Path, **changes: Any) -> Any:
    """One step of answers and distillation with one reader."""
    stage = StageConfig("s", steps=1, objectives=weighted(answer=1.0, kd=0.5))
    return train(changed(tiny_config(folder), stages=(stage,), **changes), run_dir)


def test_first_tokens_are_those_of_the_logits(llama_folder: Path, tmp_path: Path) -> None:
    """The record against logits of whole prompts, one at a time, with the weights before the
    step: learning rates are next to nothing."""
    session = run(
        llama_folder,
        tmp_path,
        attachments=(soft(expansion=1),),
        optim={"muon_lr": None, "adamw_lr": 1e-12},
    ).session
    (record,) = records(tmp_path)
    reader, model = session.readers["llama"], session.model.eval()
    accuracy, margin, entropy, ids = [], [], [], []
    for item in session.stream.batch(0, 4, facts=2):
        prompt = reader.prompts.build(item.turns, context=item.context, latent="context")
        inputs = model.reader_inputs("llama", model.encode([item.context]))
        batch = reader.collate([prompt], **inputs)
        hidden = reader.target_hidden(batch)
        logits = reader.output_head.logits(hidden)[batch.step_N == 0]
        labels = batch.labels_N[batch.step_N == 0]
        log = logits.log_softmax(-1)
        for row, label in zip(log, labels, strict=True):
            others = torch.cat([row[:label], row[label + 1 :]])
            margin.append((row[label] - others.max()).item())
            accuracy.append(float(row.argmax() == label))
            entropy.append(-(row.exp() * row).sum().item())
            ids.append(row.argmax().item())
    count = len(ids)
    for name, values in (("accuracy", accuracy), ("margin", margin), ("entropy", entropy)):
        found = record[f"first_token_{name}"]["llama"]
        assert found == pytest.approx(sum(values) / count, abs=1e-3), name
    assert sum(n for _, n in record["first_tokens"]["llama"]) <= count
    assert 0 < record["first_token_share"]["llama"] <= 1


@pytest.mark.parametrize("readers", ["sum", "sequential"])
def test_each_loss_has_a_gradient_of_its_own(
    llama_folder: Path, tmp_path: Path, readers: str
) -> None:
    """With one micro-batch, the loss without another one has the gradient that is reported; and
    measuring changes nothing."""
    whole = {"micro_batch": None, "readers": readers}
    measured = run(llama_folder, tmp_path / "a", loss_norms_every=1, optim=whole)
    plain = run(llama_folder, tmp_path / "b", optim=whole)
    pairs = zip(measured.session.state.named, plain.session.state.named, strict=True)
    assert all(torch.equal(a, b) for (_, a), (_, b) in pairs)
    (record,) = records(tmp_path / "a")
    assert set(record["loss_norms"]) == {"answer/llama", "kd/llama"}
    alone = StageConfig("s", steps=1, objectives=weighted(answer=1.0, kd=0.0))
    config = changed(tiny_config(llama_folder), stages=(alone,), optim=whole)
    train(config, tmp_path / "c")
    (expected,) = records(tmp_path / "c")
    assert record["loss_norms"]["answer/llama"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    assert math.isfinite(record["loss_norms"]["kd/llama"])
    assert "loss_norms" not in expected


def test_loss_norms_come_every_so_many_steps(llama_folder: Path) -> None:
    with pytest.raises(ConfigError, match="loss_norms_every=0, expected at least 1"):
        tiny_config(llama_folder, loss_norms_every=0)
