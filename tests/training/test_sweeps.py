"""Sweeps: what is trained, what is left alone, what a signal does, and the tables.

The trainings are stand-ins that write what a run leaves behind, but for one test.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from matplotlib.figure import Figure

from latentwire_fast.config.serialization import to_json
from latentwire_fast.config.sweep import PlannedRun, sweep_from_json
from latentwire_fast.errors import ConfigError, RunStopped, TrainingError
from latentwire_fast.evaluation.report import sweep_figure
from latentwire_fast.files.sweep_folder import SweepFolder
from latentwire_fast.training.builders import absolute_paths
from latentwire_fast.training.sweeps import forecast, processes
from latentwire_fast.training.sweeps import sweep as sweep_module
from latentwire_fast.training.sweeps.sweep import SweepRun
from runs import environment_on_the_cpu

WIDTHS = {"6": 100.0, "4": 60.0}
PLACES = [{"PLACE": "0"}, {"PLACE": "1"}]
# Stands for `python -m latentwire_fast.train`: copies prepared files, or does what a name says.
STAND_IN = """
import os, shutil, signal, sys, time
prepared, folder, behaviour = sys.argv[1:]
print("place", os.environ["PLACE"])
lent = folder + "/frozen_work/kept.bin"
print("lent", open(lent).read() if os.path.exists(lent) else "nothing")
if behaviour == "breaks":
    sys.exit("error: it broke")
if behaviour == "waits":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    open(folder + "/started", "w").close()
    time.sleep(60)
shutil.copytree(prepared, folder, dirs_exist_ok=True)
"""


def prepare(run: PlannedRun, folder: Path) -> None:
    """The files of a finished run; its scores follow from its variant and seed."""
    right = {"base": 2, "better": 4}.get(run.variant, 3) - run.config.seed % 2
    f1 = {name: [float(i < right) for i in range(4)] for name in ("one", "two")}
    metrics = {
        "run": {"mode": "context", "device": "cpu", "commit": None, "config_sha256": "0"},
        "latent": {"M": 4, "d_z": 8, "bits": 6},
        "bytes": {
            "payload_mean": WIDTHS,
            "text_utf8_mean": 170.0,
            "text_brotli_mean": 110.0,
            "text_coded_mean": {"one": 12.0},  # the other reader has no positions for the texts
        },
        "collapse": {"latent": {"effective_rank": 5.0, "pairwise_cosine": 0.5}},
        "readers": {
            name: {
                "text": {"f1": {"mean": 1.0}},
                "latent": {"f1": {"mean": sum(v) / 4}, "nll_per_token": {"mean": 0.5}},
                "latent_bits": {bits: {"f1": sum(v) / 4} for bits in WIDTHS},
                "byte_budget_bits": {bits: {"f1": sum(v) / 8} for bits in WIDTHS},
            }
            for name, v in f1.items()
        },
    }
    lines = [
        {
            "id": str(i),
            "context": str(i // 2),
            "readers": {
                name: {"latent": {"f1": v[i], "nll": (i + 1) / right, "tokens": i + 1}}
                for name, v in f1.items()
            },
        }
        for i in range(4)
    ]
    (folder / "eval").mkdir(parents=True)
    (folder / "eval" / "metrics.json").write_text(json.dumps(metrics))
    (folder / "eval" / "predictions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "config.json").write_text(json.dumps(to_json(absolute_paths(run.config))))
    records = [{"step": i, "stage": "a", "seconds": 2.0 * (i + 1)} for i in range(6)]
    (folder / "diagnostics.jsonl").write_text("\n".join(map(json.dumps, records)))
    (folder / "checkpoints").mkdir()
    (folder / "frozen_work").mkdir()
    (folder / "frozen_work" / "kept.bin").write_text(run.name)


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand-ins in the place of trainings; the names of those that were started."""
    started: list[str] = []

    def command(run: PlannedRun, folder: Path) -> list[str]:
        started.append(run.name)
        prepared = tmp_path / "prepared" / run.name
        if not prepared.exists():
            prepare(run, prepared)
        return [sys.executable, "-c", STAND_IN, str(prepared), str(folder), run.variant]

    monkeypatch.setattr(processes, "train_command", command)
    monkeypatch.setattr(forecast, "train_command", command)
    return started


def sweep_run(out: Path, *variants: str, **options: Any) -> SweepRun:
    data = {"preset": "testbed_smoke", "seeds": [0, 1], "variants": {v: [] for v in variants}}
    return SweepRun(sweep_from_json(data), out, **options)


def history(out: Path) -> list[dict[str, Any]]:
    return [json.loads(x) for x in SweepFolder(out).history.read_text().splitlines()]


def test_runs_are_trained_once_and_one_that_fails_stops_no_other(
    stand_in: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    failed = sweep_run(out, "base", "breaks", "better").train(PLACES)
    assert sorted(o.run.name for o in failed) == ["breaks/seed0", "breaks/seed1"]
    assert {o.error for o in failed} == {"error: it broke"}
    assert len(stand_in) == 6
    places = {SweepFolder(out).log(name).read_text()[:7] for name in stand_in}
    assert places <= {"place 0", "place 1"}
    ends = {(r["variant"], r["seed"]): r["status"] for r in history(out)}
    assert ends[("base", 0)] == "finished"
    assert ends[("breaks", 1)] == "failed"
    assert not (out / "base" / "seed0" / "checkpoints").exists()
    stand_in.clear()
    again = sweep_run(out, "base", "breaks", "better")
    assert [run.variant for run in again.left()] == ["breaks", "breaks"]
    again.train(PLACES[:1])
    assert stand_in == ["breaks/seed0", "breaks/seed1"]


def test_what_frozen_models_computed_for_the_first_run_is_lent_to_the_others(
    stand_in: list[str], tmp_path: Path
) -> None:
    out = SweepFolder(tmp_path / "out")

    def lent_to(name: str) -> str:
        return out.log(name).read_text().splitlines()[1]

    sweep_run(out.path, "base", "better", "breaks").train(PLACES[:1])
    assert lent_to("base/seed0") == "lent nothing"
    assert lent_to("base/seed1") == lent_to("breaks/seed1") == "lent base/seed0"
    assert out.frozen_work.exists()  # for the runs that are left
    assert not any(out.run(f"better/seed{seed}").frozen_work.exists() for seed in (0, 1))

    sweep_run(out.path, "base", "better").train(PLACES[:1])
    assert not out.frozen_work.exists()


def test_a_run_is_lent_the_frozen_work_of_the_run_that_it_starts_from(
    stand_in: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = sweep_run(tmp_path / "out", "base")
    first = replace(sweep.runs[0].config, warm_start={"all": str(tmp_path / "earlier")})
    sweep.runs[0] = replace(sweep.runs[0], config=first)
    (tmp_path / "earlier" / "frozen_work").mkdir(parents=True)
    (tmp_path / "earlier" / "frozen_work" / "kept.bin").write_text("earlier")
    own = sweep.folder.run("base/seed0").frozen_work
    monkeypatch.setattr(sweep_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    sweep._lend(sweep.runs[0])
    assert not own.exists()  # a second copy would take more than half of what is free
    monkeypatch.undo()
    sweep._lend(sweep.runs[0])
    assert (own / "kept.bin").read_text() == "earlier"


def test_the_table_compares_run_by_run_of_one_seed(stand_in: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    sweep_run(out, "base", "better", "breaks").train(PLACES)
    table = json.loads(SweepFolder(out).table.read_text())
    base, better = (table["variants"][name] for name in ("base", "better"))
    assert table["variants"]["breaks"] is None
    assert base["readers"]["one"]["f1"]["by_seed"] == [0.5, 0.25]
    assert base["readers"]["one"]["minus_base"] is None
    assert better["readers"]["two"]["minus_base"]["by_seed"] == [0.5, 0.5]
    assert better["readers"]["two"]["minus_base"]["sd"] == 0
    assert base["readers"]["one"]["f1"]["sd"] == pytest.approx(0.125 * 2**0.5)
    assert (base["effective_rank"]["mean"], base["bytes"]["mean"]) == (5.0, 100.0)
    assert base["steps_per_second"]["mean"] == 0.5
    assert base["wall_seconds"] > 0
    one, two = (base["readers"][name] for name in ("one", "two"))
    assert one["cut_text_f1_by_bits"]["4"]["by_seed"] == [0.25, 0.125]
    assert (one["coded_bytes"], two["coded_bytes"]) == (12.0, None)
    assert base["text_bytes"] == {"utf8": 170.0, "brotli": 110.0, "zstd_dictionary": None}
    assert (base["bottleneck"], base["bytes_by_bits"]) == ("uniform", WIDTHS)
    nll = better["readers"]["two"]["nll_minus_base"]
    assert nll["by_seed"] == pytest.approx([1 / 4 - 1 / 2, 1 / 3 - 1])
    assert [nll["low"], nll["high"]] == pytest.approx([nll["mean"]] * 2)  # all examples alike
    assert base["readers"]["one"]["nll_minus_base"] is None
    text = SweepFolder(out).table_text.read_text()
    assert "| better | 0 1 | 87.5 ± 17.7" in text
    assert "| breaks |" not in text
    assert "Not finished, with any seed: breaks.\n" in text
    assert "4 runs took 0.0 hours in all" in text
    assert SweepFolder(out).figure.read_bytes().startswith(b"\x89PNG")


def test_the_figure_holds_what_payloads_are_held_against(
    stand_in: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    sweep_run(out, "base", "better").train(PLACES)
    drawn: list[Figure] = []
    monkeypatch.setattr(sweep_figure, "png", lambda figure: drawn.append(figure) or b"png")
    table = json.loads(SweepFolder(out).table.read_text())
    assert sweep_figure.sweep_figure(table) == b"png"
    one, two = drawn[0].axes
    texts = [text.get_text() for text in one.texts]
    assert {"UTF-8 170", "brotli 110", "coded by one 12"} <= {*texts}
    assert not any("coded" in text.get_text() for text in two.texts)
    assert "a  87.5, 60 bytes: better, 4 bits" in texts
    lines = [[tuple(x) for x in line.get_xydata()] for line in one.lines]
    assert [(60, 18.75), (100, 18.75)] in lines or [(60, 43.75), (100, 43.75)] in lines  # cut text
    assert [(60, 37.5), (100, 37.5)] in lines  # base at its widths, joined
    assert one.get_xlim()[0] < 12
    old = table | {"variants": {"base": {"readers": {}}, "better": None}}
    assert sweep_figure.sweep_figure(old) is None


def test_a_signal_stops_every_run_and_the_same_sweep_goes_on(
    stand_in: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    sweep = sweep_run(out, "base", "waits")

    def others_wait() -> bool:
        """Whether the runs of `base` are finished, and those of `waits` under way."""
        started = all((out / "waits" / f"seed{s}" / "started").exists() for s in (0, 1))
        return started and SweepFolder(out).history.exists() and len(history(out)) == 2

    def interrupt() -> None:
        while not others_wait():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(RunStopped, match="2 runs left") as caught:
        sweep.train([*PLACES, *PLACES])
    thread.join()
    assert caught.value.status == 128 + signal.SIGINT
    assert {r["status"] for r in history(out) if r["variant"] == "waits"} == {"stopped"}
    assert [run.name for run in sweep.left()] == ["waits/seed0", "waits/seed1"]
    assert len(sweep.finished()) == 2


def test_a_folder_with_another_configuration_is_refused(
    stand_in: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    sweep_run(out, "base").train(PLACES)
    data = {"preset": "testbed_smoke", "variants": {"base": ["encoder.latents=3"]}}
    other = SweepRun(sweep_from_json(data), out)
    with pytest.raises(ConfigError, match="another configuration"):
        other.train(PLACES)
    assert other.finished() == []


def test_the_time_is_predicted_from_finished_runs_or_measured(
    stand_in: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    sweep = sweep_run(out, "base", "better")
    measured = "\n".join(sweep.forecast_lines(PLACES))
    assert "2 variants, 4 runs to train, 2 at a time" in measured
    assert "3 steps of each stage of base" in measured
    assert not out.exists()
    sweep_run(out, "base", "better", only=["base"]).train(PLACES)
    lines = sweep.forecast_lines(PLACES)
    assert [line.split()[-1] for line in lines[1:3]] == ["finished", "0.2"]  # 6 steps of 2 s
    assert "the mean of 2 finished runs" in lines[-1]
    with pytest.raises(TrainingError, match="breaks: its first steps failed: error: it broke"):
        sweep_run(tmp_path / "new", "breaks").forecast_lines(PLACES)


def test_an_unknown_variant_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--only other: no such variant; there are base"):
        sweep_run(tmp_path, "base", only=["other"])


def test_a_run_is_no_folder_for_a_sweep(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for place in (tmp_path, tmp_path / "config.json"):
        with pytest.raises(ConfigError, match="is a run, or no folder; give another --out"):
            sweep_run(place, "base")


def test_each_run_gets_its_gpu_or_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert processes.places(None, gpus=0) == [{"OMP_NUM_THREADS": "1"}] * 8
    assert processes.places(2, gpus=0) == [{"OMP_NUM_THREADS": "4"}] * 2
    found = [place["CUDA_VISIBLE_DEVICES"] for place in processes.places(None, gpus=2)]
    assert found == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    found = [place["CUDA_VISIBLE_DEVICES"] for place in processes.places(3, gpus=2)]
    assert found == ["5", "7", "5"]


@pytest.mark.slow
def test_the_command_trains_smokes_side_by_side(repository: Path, tmp_path: Path) -> None:
    """Two of the smokes of the tree, in processes."""
    out = tmp_path / "out"
    smokes = repository / "configs" / "sweeps" / "smokes.json"
    only = [x for v in ("base", "pooler_mean") for x in ("--only", v)]
    command = [sys.executable, "-m", "latentwire_fast.sweep", str(smokes), "--out", str(out)]

    def sweep(*options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *options],
            capture_output=True,
            text=True,
            check=False,
            env=environment_on_the_cpu(),
        )

    done = sweep(*only, "--jobs", "2")
    assert done.returncode == 0, done.stderr
    table = json.loads((out / "table.json").read_text())
    assert set(table["variants"]["pooler_mean"]["readers"]) == {"llama", "qwen"}
    assert len(history(out)) == 2
    again = sweep("--table")
    assert again.stdout.startswith("| variant |")
