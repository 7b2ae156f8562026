"""The prefill benchmark: its costs, clock, tables and files, and a run at sizes that mean nothing.

Nothing here asserts a time.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import gpu_prefill
import prefill_cases
import prefill_clock
import prefill_group
import prefill_latency
from ceilings import DATASHEETS, REACHABLE
from prefill_clock import Clock, Sample, Timed, interleave, interval, warm_up
from prefill_cost import Kernels, Pass, cpu_ceilings
from prefill_results import Results, for_text, result_of
from prefill_rows import DEEP, METHODS, Plan, Row, Sizes
from prefill_shapes import SHAPES, Dims, Workload, build_reader, synthetic_workload, text_prompts
from prefill_tables import latex, markdown

from latentwire_fast.config import AdapterConfig
from latentwire_fast.errors import ConfigError
from latentwire_fast.prompts import Turn
from latentwire_fast.reader import Reader

ROOT = Path(__file__).parents[1]
ROW_KEYS = [
    "reader",
    "method",
    "engine",
    "batch",
    "text_tokens",
    "M",
    "bits",
    "positions",
    "payload_bytes",
    "text_bytes",
    "kv_bytes",
    "flops",
    "phases_ms",
    "total_ms_p50",
    "total_ms_p95",
    "speedup_same_engine",
    "speedup_vs_text_eager",
    "floor_ms",
    "share_of_floor",
    "peak_memory_bytes",
]
H200 = DATASHEETS["H200"]
TINY = Dims.of(SHAPES["llama-tiny"])
TINY_SIZES = Sizes(TINY, TINY, d_z=8, template=20, element=4)


@pytest.fixture(scope="module", params=["llama-tiny", "qwen2-tiny"])
def tiny(request: pytest.FixtureRequest) -> Reader:
    return build_reader(request.param, dtype=torch.float32, device="cpu", attention="sdpa")


# --- shapes and texts -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "billions"),
    [("llama-3.1-8b", 8.03), ("qwen2.5-7b", 7.62), ("llama-160m", 0.16), ("qwen2-160m", 0.16)],
)
def test_shapes_have_the_size_that_they_are_named_after(name: str, billions: float) -> None:
    dims = Dims.of(SHAPES[name])
    weights = dims.layers * Pass(dims, 1, 1).layer_weights + 2 * dims.vocabulary * dims.width
    assert weights / 1e9 == pytest.approx(billions, rel=0.02)


def test_costs_count_what_the_model_has(tiny: Reader) -> None:
    dims = Dims.of(tiny.model.config)
    whole = Pass(dims, rows=2, new=7, element=4)
    linears = [m for m in tiny.model.get_decoder().modules() if isinstance(m, torch.nn.Linear)]
    assert dims.layers * whole.layer_weights == sum(m.weight.numel() for m in linears)
    cache = tiny.backbone(input_ids=torch.ones(2, 7, dtype=torch.long)).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert 2 * whole.kv_bytes == held
    # Attention after a past costs what it costs in one pass, split in two.
    first, rest = Pass(dims, 2, 5), Pass(dims, 2, 2, past=5)
    assert first.attention_flops + rest.attention_flops == whole.attention_flops


def test_every_row_of_a_workload_has_the_tokens_asked_for(tiny: Reader) -> None:
    builder = tiny.prompts
    work = synthetic_workload(builder, rows=3, tokens=100, seed=1)
    assert work.tokens == 100
    assert len(set(work.contexts)) == 3
    prompts = text_prompts(builder, work)
    one_by_one = [
        builder.build([Turn(question)], context=context)
        for question, context in zip(work.questions, work.contexts, strict=True)
    ]
    assert [p.ids for p in prompts] == [p.ids for p in one_by_one]
    assert work.text_bytes == sum(len(c.encode()) for c in work.contexts) / 3


def test_random_weights_cannot_be_loaded_in_4_bit() -> None:
    with pytest.raises(ConfigError, match="random weights"):
        build_reader(
            "llama-tiny", dtype=torch.float32, device="cpu", attention="sdpa", load_in_4bit=True
        )


# --- rows, floors, predictions --------------------------------------------------------------------

PLAN = Plan(METHODS, ("eager", "graph"), (250, 1000), (16, 32, 64), (6,))


def test_the_plan_has_three_lines_for_the_encoder_and_one_for_each_other_method() -> None:
    rows = list(PLAN.rows("r", 8, TINY, element=2))
    assert len(rows) == len(set(rows))
    labels = {row.label for row in rows}
    assert {"latent, cold encoder", "latent, warm encoder", "latent, cached payload"} <= labels
    assert {row.method for row in rows} == set(METHODS)
    with_encoder = [row for row in rows if row.method == "latent"]
    assert {(row.latents, row.engine) for row in with_encoder} == {(32, "graph")}
    assert all(row.engine == "eager" for row in rows if row.method == "kv_reuse")


def test_kv_reuse_is_left_out_where_the_host_cannot_hold_it() -> None:
    plan = replace(PLAN, methods=("kv_reuse",))
    big = Dims.of(SHAPES["llama-3.1-8b"])
    assert [r.text_tokens for r in plan.rows("r", 8, big, element=2)] == [250, 1000]
    assert [r.text_tokens for r in plan.rows("r", 32, big, element=2)] == [250]


def test_the_floor_is_below_the_prediction_and_above_the_weights() -> None:
    dims = Dims.of(SHAPES["llama-3.1-8b"])
    sizes = Sizes(dims, Dims.of(SHAPES["llama-160m"]), d_z=32, template=30, element=2)
    weights = 2 * (dims.layers * Pass(dims, 1, 1).layer_weights + dims.vocabulary * dims.width)
    for batch in (1, 8, 32):
        for row in PLAN.rows("r", batch, dims, element=2):
            work = sizes.work(row)
            floor = work.floor(REACHABLE["H200"])
            assert weights / REACHABLE["H200"].bytes_per_second <= floor
            predicted = {e: work.predict(REACHABLE["H200"], engine=e) for e in ("eager", "graph")}
            assert floor < predicted["graph"] <= predicted["eager"], row
    text = sizes.work(Row("r", "text", "graph", 1, 250))
    # The figures of the plan: 3.1 ms for the weights, 3.5 ms for 250 tokens at peak.
    assert 1e3 * text.floor(H200) == pytest.approx(4.0, abs=0.3)


def test_costs_count_what_the_trained_parts_have() -> None:
    dims = Dims.of(SHAPES["llama-3.1-8b"])
    sizes = replace(TINY_SIZES, dims=dims, d_z=32)
    linear = replace(sizes, adapter=AdapterConfig(kind="linear"))
    cached = Row("r", "latent_cached", "eager", 2, 0, 4, 6)
    assert linear.work(cached).parts[0].weights == 4096 * 32
    adapter, deep = (
        sizes.work(Row("r", method, "eager", 2, 0, 4, 6)).parts[0]
        for method in ("latent_cached", "deep_prefix")
    )
    assert adapter.weights == 4096 * (32 + 9 * 4096)
    assert adapter.rows == deep.rows == 8
    made = 2 * 32 * 8 * 128
    assert DEEP.deep_width * made < deep.weights < 1.5 * DEEP.deep_width * made


def test_a_compiled_engine_keeps_fewer_launches() -> None:
    kernels = Kernels(10, traffic=1e6, fusible=True)
    rates = REACHABLE["H100"]
    assert kernels.seconds(rates, engine="compile") < kernels.seconds(rates, engine="graph")
    assert kernels.seconds(rates, engine="graph") == pytest.approx(10 * rates.launch_seconds)


def test_ceilings_of_this_cpu() -> None:
    found = cpu_ceilings(torch.float32)
    assert found.bytes_per_second > 0
    assert found.flops_per_second > 0
    json.dumps(found.to_json(), allow_nan=False)


# --- the clock ------------------------------------------------------------------------------------


def test_phases_follow_one_another_without_a_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = count()
    monkeypatch.setattr(prefill_clock.time, "perf_counter", lambda: next(ticks) / 1e3)
    clock = Clock("cpu")
    for _ in range(2):
        clock.start()
        for phase in ("tokenise", "parse", "reader", "token"):
            clock.mark(phase)
        sample = clock.stop()
    assert list(sample.phases) == ["tokenise", "parse", "reader", "token"]
    assert all(ms == pytest.approx(1) for ms in sample.phases.values())
    # One reading before the first mark and one after the last are what phases leave out.
    assert sample.total == pytest.approx(sum(sample.phases.values()) + 2)


def fake_row(monkeypatch: pytest.MonkeyPatch, calls: list[str], name: str, cost: float) -> Timed:
    def run() -> Sample:
        calls.append(name)
        clock["now"] += cost
        return Sample(cost, {})

    clock = monkeypatch.__dict__.setdefault("_clock", {"now": 0.0})
    monkeypatch.setattr(prefill_clock.time, "perf_counter", lambda: clock["now"])
    monkeypatch.setattr(prefill_clock.time, "monotonic", lambda: clock["now"])
    return Timed(run)


def test_rows_interleave_and_slow_ones_stop_early(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    rows = [fake_row(monkeypatch, calls, name, cost) for name, cost in (("a", 1.0), ("b", 0.01))]
    done = list(interleave(rows, repeats=8, seconds=2.0, deadline=None))
    assert "".join(calls) == "ab" * 5 + "b" * 3
    assert done == list(range(1, 14))
    assert [len(row.samples) for row in rows] == [5, 8]


def test_nothing_starts_after_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    row = fake_row(monkeypatch, calls, "a", 1.0)
    list(interleave([row], repeats=50, seconds=None, deadline=2.5))
    assert len(row.samples) == 3


def test_warm_ups_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    row = fake_row(monkeypatch, calls, "a", 1.0)
    warm_up(row, runs=10, seconds=None)
    assert len(calls) == 10
    assert not row.samples
    warm_up(row, runs=10, seconds=1.0)
    assert len(calls) == 12


def test_the_interval_holds_the_median() -> None:
    low, high = interval([1.0, 2.0, 3.0, 4.0, 100.0])
    assert low <= 3.0 <= high
    assert interval([7.0] * 9) == (7.0, 7.0)


# --- results --------------------------------------------------------------------------------------


def some_results() -> Results:
    def measured(row: Row, *times: float, **more: Any) -> Any:
        samples = [Sample(ms, {"reader": 0.9 * ms, "token": 0.1 * ms}) for ms in times]
        return result_of(
            row, TINY_SIZES, ceilings=H200, rates=REACHABLE["H200"], samples=samples, **more
        )

    results = Results({"device": "none"})
    cached = Row("a_reader", "latent_cached", "graph", 2, 0, 8, 6)
    results.results = [
        for_text(measured(cached, 2.0, 3.0, payload_bytes=70), tokens, 10.0 * tokens)
        for tokens in (40, 80)
    ]
    for engine, factor in (("eager", 2.0), ("graph", 1.0)):
        for tokens in (40, 80):
            row = Row("a_reader", "text", engine, 2, tokens)
            results.results.append(measured(row, factor * tokens, text_bytes=10.0 * tokens))
    return results


def test_results_have_the_schema() -> None:
    found = some_results().to_json()
    assert list(found) == ["schema_version", "machine", "rows"]
    assert found["schema_version"] == 1
    assert all(list(row) == ROW_KEYS for row in found["rows"])
    json.dumps(found, allow_nan=False)
    cached = [row for row in found["rows"] if row["method"] == "latent_cached"]
    assert [row["speedup_same_engine"] for row in cached] == [40 / 2.5, 80 / 2.5]
    assert [row["speedup_vs_text_eager"] for row in cached] == [80 / 2.5, 160 / 2.5]
    assert cached[0]["total_ms_p95"] == pytest.approx(2.95)
    assert cached[0]["phases_ms"] == pytest.approx({"reader": 2.25, "token": 0.25})
    assert cached[0]["share_of_floor"] == cached[0]["floor_ms"] / 2.5


def test_tables_show_every_row() -> None:
    results = some_results()
    shown, printed = markdown(results), latex(results)
    assert shown.count("| latent, cached payload | graph |") == 2
    assert "### a_reader, batch 2" in shown
    assert r"\emph{a\_reader, batch 2}" in printed
    assert printed.count(r"latent, cached payload & graph") == 2
    assert printed.startswith(r"\begin{tabular}")
    assert r"\toprule" in printed
    assert r"\bottomrule" in printed


def test_figures_read_well_and_empty_columns_are_left_out() -> None:
    results = some_results()
    first = results.results[0]
    slow = [Sample(2345.6, {"reader": 2345.6})]
    results.results = [replace(first, samples=slow, predicted=None, flops=11_600_000_000)]
    head, _, row, *_ = markdown(results).splitlines()[2:]
    cells = dict(zip(head.split(" | "), row.split(" | "), strict=True))
    assert cells["first token, ms (p50, 95% interval)"] == "2,350 [2,350, 2,350]"
    assert cells["phases, ms"] == "reader 2,350"
    assert (cells["FLOPs"], cells["payload"]) == ("11.6 G", "70 B")
    assert "predicted, ms" not in cells
    assert "peak memory" not in cells


def test_a_text_that_was_not_measured_gives_no_speedup() -> None:
    results = some_results()
    results.results = [r for r in results.results if r.row.method != "text"]
    assert results.speedup(results.results[0], engine="graph") is None
    assert results.speedup(results.results[0], engine="eager") is None


# --- the whole ------------------------------------------------------------------------------------


def tiny_arguments(folder: Path, *more: str) -> argparse.Namespace:
    return prefill_latency.parse(
        "--readers llama-tiny --encoder llama-tiny --device cpu --batches 2 --text-tokens 40 90 "
        f"--latents 4 --warm-ups 1 --repeats 3 --out {folder}".split()
        + list(more)
    )


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prefill")
    prefill_latency.measure(tiny_arguments(folder, "--engines", "eager", "graph"))
    return folder


def test_a_run_writes_everything(ran: Path) -> None:
    results = json.loads((ran / "results.json").read_text())
    assert all(list(row) == ROW_KEYS for row in results["rows"])
    assert {row["method"] for row in results["rows"]} == set(METHODS) - {"latent"}
    with (ran / "samples.csv").open() as file:
        samples = list(csv.DictReader(file))
    assert len(samples) == 3 * len(results["rows"])
    cached = next(row for row in results["rows"] if row["method"] == "latent_cached")
    phases = ["tokenise", "parse", "dequantise", "adapter", "placement", "reader", "token"]
    assert list(cached["phases_ms"]) == phases
    assert cached["payload_bytes"] == 16 + 4 * 32 * 6 // 8 + 2 * 4
    assert cached["peak_memory_bytes"] is None
    text = [row for row in results["rows"] if row["method"] == "text"]
    assert [row["text_tokens"] for row in text] == [40, 90]
    assert all("tokenise" in row["phases_ms"] for row in results["rows"])
    for name in ("table.md", "table.tex", "latency.png", "latency.pdf"):
        assert (ran / name).stat().st_size > 100


def test_a_row_that_cannot_run_is_named_and_costs_itself_alone(ran: Path) -> None:
    machine = json.loads((ran / "results.json").read_text())["machine"]
    absent = [(row, reason) for row, reason in machine["absent"]]
    assert absent
    assert all("engine='graph'" in row for row, _ in absent)
    assert all(reason.startswith("ConfigError: a graph needs") for _, reason in absent)
    assert machine["ceilings"]["name"] == "CPU"
    assert machine["arguments"]["repeats"] == 3


def test_the_senders_encoder_is_three_lines(tmp_path: Path) -> None:
    arguments = tiny_arguments(tmp_path, "--engines", "eager", "--methods", "latent", "text")
    arguments.text_tokens = [40]
    results = prefill_latency.measure(arguments)
    phases = {
        result.row.encoder: list(result.phases)
        for result in results.results
        if result.row.method == "latent"
    }
    assert phases["warm"][:2] == ["encode", "tokenise"]
    assert phases["cold"][:3] == ["load encoder", "encode", "tokenise"]
    assert not results.machine["absent"]


def test_dequantising_is_a_part_of_a_linear_adapter(tmp_path: Path) -> None:
    arguments = tiny_arguments(tmp_path, "--adapter", "linear", "--bits", "16", "4")
    arguments.engines, arguments.methods = ["eager"], ["latent_cached", "deep_prefix"]
    results = prefill_latency.measure(arguments)
    assert not results.machine["absent"]
    unpacks = {(r.row.method, r.row.bits): "dequantise" in r.phases for r in results.results}
    assert unpacks == {
        ("latent_cached", 16): True,
        ("latent_cached", 4): False,
        ("deep_prefix", 16): True,
        ("deep_prefix", 4): True,
    }


def test_a_row_that_fails_its_gate_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = prefill_cases.build_case

    def wrong(bench: Any, row: Row, workload: Workload) -> Any:
        case = build(bench, row, workload)
        if row.method == "kv_reuse":
            case.logits = lambda: torch.zeros(2, SHAPES["llama-tiny"].vocab_size)
        return case

    monkeypatch.setattr(prefill_group, "build_case", wrong)
    arguments = tiny_arguments(tmp_path, "--methods", "text", "kv_reuse", "--engines", "eager")
    results = prefill_latency.measure(arguments)
    assert {r.row.method for r in results.results} == {"text"}
    assert all("the gate: logits off by" in reason for _, reason in results.machine["absent"])


def test_a_budget_is_shared_and_spent(tmp_path: Path) -> None:
    arguments = tiny_arguments(tmp_path, "--budget", "0", "--engines", "eager")
    results = prefill_latency.measure(arguments)
    assert not results.results
    assert {reason for _, reason in results.machine["absent"]} == {"out of time"}
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == []
    weights = {("a", 1): 1.0, ("a", 8): 3.0}
    assert prefill_latency.share(weights, "a", 1) == 0.25
    assert prefill_latency.share(weights, "a", 8) == 1.0


def test_real_texts_come_from_a_file(tmp_path: Path) -> None:
    from latentwire_fast.testbed.task import make_examples
    from runs import squad_file

    path = squad_file(make_examples(3, seed=4), tmp_path / "squad.json")
    arguments = tiny_arguments(tmp_path, "--data", str(path), "--methods", "text", "latent_cached")
    results = prefill_latency.measure(arguments)
    assert {r.row.method for r in results.results} == {"text", "latent_cached"}
    assert len({r.row.text_tokens for r in results.results}) == 1
    arguments.batches = [50]
    with pytest.raises(ConfigError, match="has 3 examples, a batch of 50 needs as many"):
        prefill_latency.measure(arguments)


def test_predictions_need_no_gpu(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = "--predict --batches 1 8 --text-tokens 250 --latents 32 --gpus H100 --out"
    prefill_latency.predict(prefill_latency.parse([*arguments.split(), str(tmp_path)]))
    printed = capsys.readouterr().out
    assert "H100 SXM, datasheet: predicted, nothing measured" in printed
    assert printed.count("| latent, cached payload | graph | 250 | 32 |") == 4
    assert "### qwen2.5-7b, batch 8" in (tmp_path / "H100" / "predicted.md").read_text()


@pytest.mark.parametrize("wrong", ["--latents 0", "--bits 5", "--data x --predict", "--nothing"])
def test_wrong_arguments(wrong: str) -> None:
    with pytest.raises(SystemExit):
        prefill_latency.parse(wrong.split())


IMPORTS = """
import builtins, runpy, sys
from pathlib import Path

root, allowed, found = Path.cwd(), set(sys.stdlib_module_names), set()
original = builtins.__import__

def watched(name, globals=None, locals=None, fromlist=(), level=0):
    file = Path((globals or {}).get("__file__") or "/")
    if level == 0 and root in file.parents and ".venv" not in file.parts:
        top = name.split(".")[0]
        mine = (root / "bench" / f"{top}.py").exists() or top == "latentwire_fast"
        if top not in allowed and not mine:
            found.add(top)
    return original(name, globals, locals, fromlist, level)

builtins.__import__ = watched
sys.argv = ["prefill_latency.py", *sys.argv[1:]]
runpy.run_path("bench/prefill_latency.py", run_name="__main__")
print("IMPORTED", *sorted(found))
"""
# What torch (jinja2) and transformers require counts with them.
BARE = {
    "torch",
    "jinja2",
    "transformers",
    "numpy",
    "safetensors",
    "tokenizers",
    "matplotlib",
    "tqdm",
}


@pytest.mark.slow
def test_a_run_imports_nothing_that_a_bare_gpu_machine_lacks(tmp_path: Path) -> None:
    options = "--readers llama-tiny --encoder llama-tiny --device cpu --engines eager --batches 1 "
    options += f"--text-tokens 40 --latents 4 --warm-ups 1 --repeats 2 --out {tmp_path}"
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS, *options.split()],
        cwd=ROOT,
        env={
            "PATH": "",
            "PYTHONPATH": "bench",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "HOME": str(tmp_path),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    imported = set(done.stdout.split("IMPORTED")[1].split())
    assert imported - {"latentwire_fast"} <= BARE


# --- the run on a GPU -----------------------------------------------------------------------------


def run_sections(
    folder: Path, monkeypatch: pytest.MonkeyPatch, outcome: Callable[[Any], str], seconds: float
) -> int:
    monkeypatch.setattr(gpu_prefill, "tests", lambda folder, limit: gpu_prefill.OK)
    monkeypatch.setattr(gpu_prefill, "latency", lambda section, folder, limit: outcome(section))
    return gpu_prefill.run_all(folder, gpu_prefill.SECTIONS, seconds=seconds, tiny=False)


def test_sections_fit_nine_minutes_and_their_options_parse() -> None:
    whole = gpu_prefill.TESTS_SECONDS + sum(s.seconds for s in gpu_prefill.SECTIONS)
    assert whole <= gpu_prefill.TOTAL_SECONDS < 540
    for section in gpu_prefill.SECTIONS:
        prefill_latency.parse(section.options.split())
    prefill_latency.parse(gpu_prefill.TINY.split())


def test_a_section_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def outcome(section: Any) -> str:
        return "failed: status 1" if section.name == "compile" else gpu_prefill.OK

    assert run_sections(tmp_path, monkeypatch, outcome, seconds=500) == 1
    lines = (tmp_path / "sections.txt").read_text().splitlines()
    assert lines == [
        "tests: done",
        "tables: done",
        "compile: failed: status 1",
        "two_devices: done",
    ]
    assert run_sections(tmp_path, monkeypatch, lambda section: gpu_prefill.OK, seconds=500) == 0
    assert run_sections(tmp_path, monkeypatch, lambda section: gpu_prefill.OK, seconds=1) == 1
    assert "not run: out of time" in (tmp_path / "sections.txt").read_text()
