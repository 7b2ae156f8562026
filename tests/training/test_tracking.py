"""Run logs: `diagnostics.jsonl` across resumes, TensorBoard, latent and gradient statistics."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from latentwire_fast.evaluation.spread import latent_statistics
from latentwire_fast.files import atomic
from latentwire_fast.files.run_folder import RunFolder
from latentwire_fast.training.tracking import (
    Tracker,
    module_gradient_norms,
    read_records,
)


def record(step: int, **extra: object) -> dict:
    given = {"stage": "answer", "loss": 1 / step, "losses": {"answer": 2.0}, "seconds": 0.5}
    return {"step": step, **given, **extra}


def steps_in(run_dir: Path) -> list[int]:
    lines = (run_dir / "diagnostics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def board(run_dir: Path) -> EventAccumulator:
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return events


def test_records_are_complete_lines_at_once(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with Tracker(RunFolder(run_dir), resume_step=None) as tracker:
        for step in (10, 20):
            tracker.log(record(step))
            assert steps_in(run_dir)[-1] == step, "not flushed"
    lines = (run_dir / "diagnostics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [record(10), record(20)]


def test_values_become_strict_json(tmp_path: Path) -> None:
    with Tracker(RunFolder(tmp_path), resume_step=None) as tracker:
        tracker.log({
            "step": 1,
            "loss": torch.tensor(0.5),
            "grad_norms": {"encoder": math.inf, "adapter": torch.tensor(math.nan)},
            "rms": {"llama": {"pre": 1.5, "post": 0.25}},
            "flags": [True, 2, (3.0, math.nan)],
        })  # fmt: skip
    text = (tmp_path / "diagnostics.jsonl").read_text()

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    assert json.loads(text, parse_constant=refuse) == {
        "step": 1,
        "loss": 0.5,
        "grad_norms": {"encoder": None, "adapter": None},
        "rms": {"llama": {"pre": 1.5, "post": 0.25}},
        "flags": [True, 2, [3.0, None]],
    }
    scalars = board(tmp_path).Tags()["scalars"]
    assert sorted(scalars) == ["loss", "rms/llama/post", "rms/llama/pre"]


def test_resume_drops_later_records(tmp_path: Path) -> None:
    with Tracker(RunFolder(tmp_path), resume_step=None) as tracker:
        for step in (10, 20, 30, 40):
            tracker.log(record(step))
    with Tracker(RunFolder(tmp_path), resume_step=20) as tracker:
        assert steps_in(tmp_path) == [10, 20]
        tracker.log(record(30, note="again"))
    assert steps_in(tmp_path) == [10, 20, 30]
    assert [event.step for event in board(tmp_path).Scalars("losses/answer")] == [10, 20, 30]


def test_a_new_run_starts_empty(tmp_path: Path) -> None:
    (tmp_path / "diagnostics.jsonl").write_text(json.dumps(record(5)) + "\n")
    with Tracker(RunFolder(tmp_path), resume_step=None):
        assert steps_in(tmp_path) == []


def test_a_torn_line_is_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "diagnostics.jsonl"
    whole = json.dumps(record(10)) + "\n"
    for length in range(len(whole) - 1):
        path.write_text(whole + whole[:length])
        with Tracker(RunFolder(tmp_path), resume_step=10) as tracker:
            tracker.log(record(20))
        assert steps_in(tmp_path) == [10, 20]
    assert "dropped 1 unreadable lines" in caplog.text


@pytest.mark.parametrize(
    "line",
    [
        {"step": 1},
        *("text", None, [], 7),
        {**record(2), "step": "2"},
        record(2, seconds=None),
        record(2, loss="nan"),
        record(2, losses="none"),
        record(2, losses={"answer": "2.0"}),
        record(2, accuracy=[0.5]),
        record(2, latent={"effective_rank": "high"}),
    ],
    ids=repr,
)
def test_what_is_no_record_is_dropped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, line: object
) -> None:
    path = tmp_path / "diagnostics.jsonl"
    # Numbers that are not finite are written as null.
    first, last = record(1, loss=None), record(3, latent={"effective_rank": None}, accuracy=None)
    path.write_text("".join(json.dumps(value) + "\n" for value in (first, line, last)))
    assert read_records(path) == [first, last]
    assert "dropped 1 unreadable lines" in caplog.text


def test_a_failing_truncation_leaves_the_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Tracker(RunFolder(tmp_path), resume_step=None) as tracker:
        tracker.log(record(10))
        tracker.log(record(20))

    class NoRename(atomic.Disk):
        def rename(self, source: Path, target: Path) -> None:
            raise OSError("simulated")

    monkeypatch.setattr(atomic, "disk", NoRename())
    with pytest.raises(OSError, match="simulated"):
        Tracker(RunFolder(tmp_path), resume_step=10)
    assert steps_in(tmp_path) == [10, 20]


def test_latents_that_span_k_directions_have_rank_k() -> None:
    """k pairs of opposite latents along k orthogonal axes: k equal singular values, mean zero."""
    for k in (1, 3, 6):
        axes = torch.eye(12)[:k].view(k, 3, 4)
        found = latent_statistics(torch.cat([axes, -axes]))
        assert found["effective_rank"] == pytest.approx(k)
        assert found["pairwise_cosine"] == pytest.approx(-1 / (2 * k - 1))


def test_centring_removes_what_all_latents_share() -> None:
    axes = torch.eye(12)[:3].view(3, 3, 4)
    shifted = torch.cat([axes, -axes]) + 50.0
    found = latent_statistics(shifted)
    assert found["effective_rank"] == pytest.approx(3, rel=1e-5)
    assert found["pairwise_cosine"] > 0.999


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", ["equal", "zero"])
def test_collapse_has_rank_zero(dtype: torch.dtype, value: str) -> None:
    one = torch.randn(1, 4, 8) if value == "equal" else torch.zeros(1, 4, 8)
    found = latent_statistics(one.expand(7, 4, 8).to(dtype))
    assert found["effective_rank"] == 0.0
    assert found["pairwise_cosine"] == pytest.approx(1.0 if value == "equal" else 0.0)


def test_random_latents_nearly_fill_the_batch() -> None:
    found = latent_statistics(torch.randn(16, 12, 64))
    assert 14 < found["effective_rank"] <= 15
    assert abs(found["pairwise_cosine"]) < 0.02


def test_one_latent_has_no_statistics() -> None:
    assert all(math.isnan(value) for value in latent_statistics(torch.randn(1, 2, 3)).values())


def test_statistics_need_no_gradient() -> None:
    assert latent_statistics(torch.randn(4, 2, 3, requires_grad=True))["effective_rank"] > 0


def test_module_gradient_norms() -> None:
    encoder, adapter, idle = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 2)
    adapter(encoder(torch.randn(5, 3))).square().sum().backward()
    norms = module_gradient_norms({"encoder": encoder, "adapter": adapter, "idle": idle})
    for name, module in (("encoder", encoder), ("adapter", adapter)):
        grads = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
        assert norms[name] == pytest.approx(grads.norm().item())
    assert norms["idle"] == 0.0
    assert module_gradient_norms({}) == {}
