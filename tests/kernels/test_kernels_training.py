"""Training with distillation gives the same losses through the kernels as through the reference."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState

from kernel_device import needs_kernels
from latentwire_fast import ops
from latentwire_fast.config.presets import weighted
from latentwire_fast.config.schema import StageConfig
from latentwire_fast.registry import OBJECTIVES
from runs import changed, records, tiny_config, train

pytestmark = [needs_kernels, pytest.mark.filterwarnings("ignore::RuntimeWarning")]


@pytest.fixture(autouse=True)
def _accelerate_starts_anew() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.slow
def test_training_with_distillation_matches_the_reference(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four steps of answers and distillation at 6 bits: quantiser, adapter and loss are kernels."""
    distilled = OBJECTIVES.config("kd", weight=0.5, tau=2.0)
    objectives = (*weighted(answer=1.0), distilled)
    stage = StageConfig("kd", steps=4, objectives=objectives, quantize=6)
    config = changed(
        tiny_config(llama_folder), stages=(stage,), optim={"batch_size": 2, "micro_batch": 2}
    )
    lines = {}
    for name in ("reference", "triton"):
        with ops.backend(name):
            train(config, tmp_path / name)
        lines[name] = records(tmp_path / name)

    from latentwire_fast.kernels import linear_losses

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("reached")

    monkeypatch.setattr(linear_losses, "linear_losses", fail)
    with ops.backend("triton"), pytest.raises(AssertionError, match="reached"):
        train(config, tmp_path / "again")

    assert len(lines["triton"]) == stage.steps
    for step, (ours, expected) in enumerate(zip(lines["triton"], lines["reference"], strict=True)):
        # A step's rounding is magnified by the next (measured: 1e-7, 2e-6, 2e-4, 2e-3).
        near = 1e-5 * 10**step
        assert expected["losses"]["kd/llama"] > 1e-3
        for part, value in expected["losses"].items():
            assert ours["losses"][part] == pytest.approx(value, rel=near), part
        assert ours["grad_norm"] == pytest.approx(expected["grad_norm"], rel=10 * near)
