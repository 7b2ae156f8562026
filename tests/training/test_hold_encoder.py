"""A stage that holds the encoder trains what stands behind it, and the next one trains both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from latentwire_fast.config.presets import weighted
from latentwire_fast.config.schema import StageConfig
from runs import changed, deep, tiny_config, train


@pytest.mark.parametrize("readers", ["sum", "sequential"])
def test_the_encoder_moves_in_the_second_stage_only(
    llama_folder: Path, qwen_folder: Path, tmp_path: Path, readers: str
) -> None:
    held = StageConfig("held", steps=2, objectives=weighted(attention=1.0), hold_encoder=True)
    free = StageConfig("free", steps=1, objectives=weighted(attention=1.0))
    encoders, others = [], []
    for number, stages in enumerate(((held,), (held, free))):
        config = changed(
            tiny_config(llama_folder, qwen_folder),
            attachments=(deep(width=16, heads=2, expansion=1, in_place=True),),
            stages=stages,
            optim={"readers": readers},
        )
        model = train(config, tmp_path / f"run{number}").session.model
        encoders.append(model.encoder.project.weight.detach().clone())
        others.append(model.attachments["llama"]["deep"].lift.weight.detach().clone())
    torch.manual_seed(0)
    trainer = train(
        changed(
            tiny_config(llama_folder, qwen_folder),
            attachments=(deep(width=16, heads=2, expansion=1, in_place=True),),
            stages=(StageConfig("held", steps=1, objectives=held.objectives, hold_encoder=True),),
            optim={"readers": readers},
        ),
        tmp_path / "one",
    )
    start = trainer.session.model
    assert torch.equal(encoders[0], start.encoder.project.weight.detach())
    assert not torch.equal(others[0], start.attachments["llama"]["deep"].lift.weight.detach())
    assert not torch.equal(encoders[1], encoders[0])
