"""The prefill benchmark: its costs, clock, tables and files, and a run at sizes that mean nothing.

Nothing here asserts a time.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from bench import prefill_latency
from bench.kernels.ceilings import DATASHEETS, REACHABLE, reachable
from bench.prefill import cases, clock, files, gpu_prefill, group, measure
from bench.prefill.clock import Clock, Sample, interval
from bench.prefill.cost import Kernels, Pass, cpu_ceilings
from bench.prefill.results import Results, for_text, result_of
from bench.prefill.rows import DEEP, METHODS, SOFT, Plan, Row, Sizes, plan_of, soft_prompt
from bench.prefill.shapes import (
    SHAPES,
    Workload,
    build_reader,
    rest_prompts,
    split_prompts,
    synthetic_workload,
    text_prompts,
)
from bench.prefill.tables import latex, markdown
from latentwire_fast import ops
from latentwire_fast.errors import ConfigError
from latentwire_fast.prompts.builder import (
    PromptBuilder,
    Turn,
    context_text,
    full_text,
    question_text,
)
from latentwire_fast.readers.reader import Reader
from latentwire_fast.readers.shapes import Dims
from latentwire_fast.serving import prefixes

ROOT = Path(__file__).parents[2]
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


# Words, and punctuation with the line breaks behind it, as in Llama 3 and Qwen2.
JOINING = r" ?[^\W\d_]+|\d| ?[^\s\w]+[\r\n]*|\s+"


def joining_prompts(*, words: bool) -> PromptBuilder:
    """Prompts of a tokenizer that joins a context's end with what follows, or `words` as well."""
    tokenizer = Tokenizer(models.BPE())
    split: Any = pre_tokenizers.Split(Regex(r"[\s\S]+" if words else JOINING), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<e>"],
        show_progress=False,
    )
    texts = [full_text("Nulnak lives in Bakrim.", "Where does Nulnak live?")] * 20
    tokenizer.train_from_iterator(texts, trainer)
    return PromptBuilder(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<e>"))


def test_kv_reuse_reads_the_tokens_of_the_whole_text() -> None:
    work = Workload(["In Bakrim.", "Nulnak lives in Bakrim."], ["Who?", "Where?"], 8)
    builder = joining_prompts(words=False)
    apart = builder.text_ids(context_text("In Bakrim.")) + builder.text_ids(question_text("Who?"))
    assert apart != builder.text_ids(full_text("In Bakrim.", "Who?"))
    held, rests = split_prompts(builder, work)
    asked, whole = rest_prompts(builder, rests), text_prompts(builder, work)
    assert [h + a.ids for h, a in zip(held, asked, strict=True)] == [p.ids for p in whole]
    assert all(held)
    learnt = Workload(["Nulnak lives in Bakrim."], ["Where does Nulnak live?"], 8)
    with pytest.raises(ConfigError, match="joins the last word"):
        split_prompts(joining_prompts(words=True), learnt)


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
    assert {row.latents for row in rows if row.method == "deep_prefix"} == {32}
    cached = {(row.latents, row.engine) for row in rows if row.method == "latent_cached"}
    assert cached == {(32, "eager"), (16, "graph"), (32, "graph"), (64, "graph")}
    assert all(row.engine == "eager" for row in rows if row.method == "kv_reuse")


def test_kv_reuse_is_left_out_where_the_host_cannot_hold_it() -> None:
    plan = replace(PLAN, methods=("kv_reuse",))
    big = Dims.of(SHAPES["llama-3.1-8b"])
    assert [r.text_tokens for r in plan.rows("r", 8, big, element=2)] == [250, 1000]
    assert [r.text_tokens for r in plan.rows("r", 32, big, element=2)] == [250]


def test_long_texts_and_the_sender_can_be_left_out_by_batch() -> None:
    plan = replace(PLAN, most_tokens=8000, sender_batches=(8,))
    rows = {b: list(plan.rows("r", b, TINY, element=2)) for b in (1, 8, 32)}
    lengths = {b: {r.text_tokens for r in found if r.text_tokens} for b, found in rows.items()}
    assert lengths == {1: {250, 1000}, 8: {250, 1000}, 32: {250}}
    assert [b for b, found in rows.items() if any(r.encoder for r in found)] == [8]


def test_the_floor_is_below_the_prediction_and_above_the_weights() -> None:
    dims = Dims.of(SHAPES["llama-3.1-8b"])
    sizes = Sizes(dims, Dims.of(SHAPES["llama-160m"]), d_z=32, template=30, element=2)
    weights = 2 * (dims.layers * Pass(dims, 1, 1).layer_weights + dims.vocabulary * dims.width)
    for batch in (1, 8, 32):
        for row in PLAN.rows("r", batch, dims, element=2):
            cost = sizes.cost(row)
            floor = cost.floor(REACHABLE["H200"])
            assert weights / REACHABLE["H200"].bytes_per_second <= floor
            predicted = {e: cost.predict(REACHABLE["H200"], engine=e) for e in ("eager", "graph")}
            assert floor < predicted["graph"] <= predicted["eager"], row
    text = sizes.cost(Row("r", "text", "graph", 1, 250))
    # The figures of the plan: 3.1 ms for the weights, 3.5 ms for 250 tokens at peak.
    assert 1e3 * text.floor(H200) == pytest.approx(4.0, abs=0.3)


def test_costs_count_what_the_trained_parts_have() -> None:
    dims = Dims.of(SHAPES["llama-3.1-8b"])
    sizes = replace(TINY_SIZES, dims=dims, d_z=32)
    linear = replace(sizes, adapter=soft_prompt("linear"))
    cached = Row("r", "latent_cached", "eager", 2, 0, 4, 6)
    assert linear.cost(cached).parts[0].weights == 4096 * 32
    adapter, deep = (
        sizes.cost(Row("r", method, "eager", 2, 0, 4, 6)).parts[0]
        for method in ("latent_cached", "deep_prefix")
    )
    assert adapter.weights == 4096 * (32 + 9 * 4096)
    assert adapter.rows == deep.rows == 8
    key_value_numbers = 2 * 32 * 8 * 128
    assert 1.0 < deep.weights / (DEEP.width * key_value_numbers) < 1.5


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
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(ticks) / 1e3)
    phases = Clock("cpu")
    for _ in range(2):
        phases.start()
        for phase in ("tokenise", "parse", "reader", "token"):
            phases.mark(phase)
        sample = phases.stop()
    assert list(sample.phases) == ["tokenise", "parse", "reader", "token"]
    assert all(ms == pytest.approx(1) for ms in sample.phases.values())
    # One reading before the first mark and one after the last are what phases leave out.
    assert sample.total == pytest.approx(sum(sample.phases.values()) + 2)


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
    assert cached[0]["phases_ms"] == pytest.approx({"reader": 1.8, "token": 0.2})
    assert cached[0]["share_of_floor"] == cached[0]["floor_ms"] / 2.5


def test_phases_are_those_of_typical_runs_and_add_up() -> None:
    """Where phases trade places from run to run, their medians do not add up to the total's."""
    results = some_results()
    samples = [Sample(10.0 + i, {"reader": r, "token": 10.0 + i - r})
               for i, r in enumerate([1.0, 9.0, 1.0, 9.0, 5.0] * 4)]  # fmt: skip
    result = replace(results.results[0], samples=samples)
    assert result.p50 == 19.5
    assert result.phases == {"reader": 6.0, "token": 13.5}
    assert result.sum_of_phases == pytest.approx(1)


def test_tables_show_every_row() -> None:
    results = some_results()
    shown = markdown(results)
    assert shown.count("| latent, cached payload | graph |") == 2
    assert "### a_reader, batch 2" in shown


def test_latex_is_two_tables_for_each_reader_and_batch() -> None:
    results = some_results()
    more = [replace(r, row=replace(r.row, batch=4)) for r in results.results]
    results.results += more
    printed = latex(results)
    assert printed.count(r"\begin{tabular}") == printed.count(r"\end{table*}") == 2 * 2
    assert r"\caption{a\_reader, batch 2: time to the first token.}" in printed
    tables = printed.split(r"\end{table*}")[:-1]
    for table in tables:
        lines = [line for line in table.splitlines() if line.endswith(r"\\")]
        assert len({line.count(" & ") for line in lines}) == 1
        # A cached payload is one line for all texts, with a speed-up for each.
        cached = [line for line in lines if line.startswith("latent, cached payload & graph")]
        assert len(cached) == 1
        assert " & 40 / 80 & 8 & " in cached[0]
        assert len(lines) == 1 + 1 + 4
    assert " & 16 / 32 & 32 / 64 & " in tables[0]
    heads = next(line for line in tables[1].splitlines() if line.startswith("method"))
    for column in ("KV", "FLOPs", "p95, ms", "text tokens/s", "phases, ms"):
        assert f" & {column}" in heads


def test_the_figure_has_numbers_and_a_row_of_panels_per_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib import pyplot as plt

    results = some_results()
    close = [replace(r, samples=[Sample(3.0 + i, {})]) for i, r in enumerate(results.results)]
    for change in ({"batch": 4}, {"reader": "b"}):
        results.results += [replace(r, row=replace(r.row, **change)) for r in close]
    drawn: list[Any] = []
    shut = plt.close
    monkeypatch.setattr(plt, "close", drawn.append)
    files._draw(results, tmp_path)
    panels = drawn[0].axes
    assert [panel.get_title() for panel in panels] == [
        *("a_reader, batch 2", "a_reader, batch 4", "b, batch 2", "b, batch 4"),
    ]
    drawn[0].canvas.draw()
    for panel in panels[:3]:  # the third spans less than a decade
        low, high = panel.get_ylim()
        labels = panel.yaxis.get_ticklabels()
        assert [t for t in labels if low <= t.get_position()[1] <= high and t.get_text()]
        assert [t.get_text() for t in panel.get_xticklabels()] == ["40", "80"]
    shut(drawn[0])


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
    measured = {(r["method"], r["text_tokens"]) for r in results["rows"]}
    assert len(measured) == 2 * 4
    assert len(samples) == 3 * 6  # those that do not depend on the text were measured once
    assert {s["text_tokens"] for s in samples if s["method"] == "deep_prefix"} == {""}
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
    assert all("llama-tiny, batch 2: " in row and ", graph" in row for row, _ in absent)
    for _, reason in absent:
        assert reason.startswith("ConfigError: reader 'llama-tiny' cannot run as a CUDA graph")
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
    build = cases.build_case

    def wrong(bench: Any, row: Row, workload: Workload) -> Any:
        case = build(bench, row, workload)
        if row.method == "kv_reuse":
            case.logits = lambda: torch.zeros(2, SHAPES["llama-tiny"].vocab_size)
        return case

    monkeypatch.setattr(group, "build_case", wrong)
    arguments = tiny_arguments(tmp_path, "--methods", "text", "kv_reuse", "--engines", "eager")
    results = prefill_latency.measure(arguments)
    assert {r.row.method for r in results.results} == {"text"}
    assert all("the gate: logits off by" in reason for _, reason in results.machine["absent"])


def test_a_kernel_that_is_wrong_fails_the_gate_in_every_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits are compared with those of the reference, not with another run of the kernel."""
    original = prefixes.dequantize
    monkeypatch.setattr(ops.dispatch, "_backend", "auto")

    def kernel(codes: torch.Tensor, scales: torch.Tensor, header: Any) -> torch.Tensor:
        factor = 1.0 if ops.dispatch._backend == "reference" else 1.5
        return factor * original(codes, scales, header)

    monkeypatch.setattr(prefixes, "dequantize", kernel)
    arguments = tiny_arguments(tmp_path, "--methods", "text", "latent_cached", "deep_prefix")
    arguments.engines, arguments.text_tokens = ["eager", "compile"], [40]
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: compile_(*a, **k, backend="eager"))
    machine = prefill_latency.measure(arguments).machine
    assert len(machine["absent"]) == 3
    assert all("the gate: logits off by" in reason for _, reason in machine["absent"])
    assert [title.split(": ")[1] for title, _ in machine["gates"]] == [
        "text, eager, 40 tokens",
        "text, compile, 40 tokens",
    ]


def test_halves_of_a_reader_are_compared_with_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(reader: Reader, device: str) -> None:
        prefill_measure_split(reader, device)
        reader.model.model.layers[1].mlp.down_proj.weight.data.mul_(1.5)

    prefill_measure_split = measure.split_over_cpu
    monkeypatch.setattr(measure, "settle", lambda args: None)
    found = {}
    for name, split in (("whole", prefill_measure_split), ("broken", broken)):
        monkeypatch.setattr(measure, "split_over_cpu", split)
        arguments = tiny_arguments(tmp_path, "--methods", "text", "latent_cached", "deep_prefix")
        arguments.engines, arguments.text_tokens = ["eager"], [40]
        arguments.dtype, arguments.half_on_cpu = "float32", True
        found[name] = prefill_latency.measure(arguments)
    assert {r.row.method for r in found["whole"].results} == {
        "text",
        "latent_cached",
        "deep_prefix",
    }
    assert all(r.row.reader == "llama-tiny, half on cpu" for r in found["whole"].results)
    assert not found["broken"].results
    assert len(found["broken"].machine["absent"]) == 3


def test_memory_that_runs_out_in_a_timed_run_costs_that_row_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = cases.build_case

    def fails_late(bench: Any, row: Row, workload: Workload) -> Any:
        case = build(bench, row, workload)
        if row.method == "kv_reuse":
            runs, run = count(), case.run
            case.run = lambda: run() if next(runs) < 2 else 1 / 0
        return case

    monkeypatch.setattr(group, "build_case", fails_late)
    arguments = tiny_arguments(tmp_path, "--methods", "text", "kv_reuse", "--engines", "eager")
    results = prefill_latency.measure(arguments)
    assert {r.row.method for r in results.results} == {"text"}
    assert {why.split(":")[0] for _, why in results.machine["absent"]} == {"ZeroDivisionError"}
    assert (tmp_path / "results.json").exists()


def test_a_reader_that_cannot_be_built_costs_itself_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(source: str, **options: Any) -> Reader:
        if source == "qwen2-tiny":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return build_reader(source, **options)

    monkeypatch.setattr(measure, "build_reader", build)
    arguments = tiny_arguments(tmp_path, "--methods", "text", "--engines", "eager")
    arguments.readers = ["qwen2-tiny", "llama-tiny"]
    results = prefill_latency.measure(arguments)
    assert {r.row.reader for r in results.results} == {"llama-tiny"}
    assert results.machine["absent"] == [
        ["qwen2-tiny", "OutOfMemoryError: CUDA out of memory"],
    ]


def test_peak_memory_is_that_of_a_run_and_of_what_the_row_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not of making the row, nor of what it is compared with."""
    arguments = tiny_arguments(tmp_path, "--methods", "text", "kv_reuse", "--engines", "eager")
    measure.settle(arguments)
    arguments.name, memory = "llama-tiny", {"now": 1000, "peak": 0}
    reader = build_reader("llama-tiny", dtype=torch.float32, device="cpu", attention="sdpa")
    bench = cases.Bench(
        *(reader, "llama-tiny", SOFT, 8),
        dtype=torch.float32, device="cpu", scratch=tmp_path,
    )  # fmt: skip
    rows = group.Group(bench, plan_of(arguments), arguments, batch=2)
    held_bytes = {"text": 10, "kv_reuse": 20}

    def use(amount: int) -> None:
        memory["peak"] = max(memory["peak"], memory["now"] + amount)

    def build(bench: Any, row: Row, workload: Workload) -> cases.Case:
        use(9999)  # the prefill that makes keys and values to be reused
        memory["now"] += held_bytes[row.method]

        def logits() -> torch.Tensor:
            use(300 if row.method == "text" else 5)
            return torch.ones(2, 3)

        same = replace(row, method="text") if row.method == "kv_reuse" else None
        return cases.Case(row, lambda: Sample(1.0, {}), logits, same)

    monkeypatch.setattr(group, "build_case", build)
    for name, stand_in in {
        "synchronize": lambda: None,
        "memory_allocated": lambda: memory["now"],
        "max_memory_allocated": lambda: memory["peak"],
        "reset_peak_memory_stats": lambda: memory.update(peak=memory["now"]),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    bench.device = "cuda:0"
    weights = reader.model.get_memory_footprint()
    reuse, text = (
        next(row for row in rows.rows if row.method == method) for method in ("kv_reuse", "text")
    )
    for row, expected in ((reuse, 20 + 5), (text, 10 + 300)):  # the first one makes its text
        rows._ready(row)
        assert rows._facts[row][1] == weights + expected


def test_no_time_is_no_rows(tmp_path: Path) -> None:
    arguments = tiny_arguments(tmp_path, "--budget", "0", "--engines", "eager")
    results = prefill_latency.measure(arguments)
    assert not results.results
    assert {reason for _, reason in results.machine["absent"]} == {"out of time"}
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == []


def test_real_texts_come_from_a_file(tmp_path: Path) -> None:
    from latentwire_fast.data.testbed import make_examples
    from runs import squad_file

    path = squad_file(make_examples(3, seed=4), tmp_path / "squad.json")
    arguments = tiny_arguments(tmp_path, "--data", str(path), "--methods", "text", "latent_cached")
    results = prefill_latency.measure(arguments)
    assert {r.row.method for r in results.results} == {"text", "latent_cached"}
    assert len({r.row.text_tokens for r in results.results}) == 1
    arguments.batches = [50, 1]
    results = prefill_latency.measure(arguments)
    why = [f"ConfigError: {path} has 3 examples, a batch of 50 needs as many"]
    assert results.machine["absent"] == [["llama-tiny, batch 50", *why]]
    assert {r.row.batch for r in results.results} == {1}


def test_predictions_need_no_gpu(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = "--predict --batches 1 8 --text-tokens 250 --latents 32 --gpus H100 --out"
    prefill_latency.predict(prefill_latency.parse([*arguments.split(), str(tmp_path)]))
    printed = capsys.readouterr().out
    assert "H100 SXM, datasheet: predicted, nothing measured" in printed
    assert printed.count("| latent, cached payload | graph | 250 | 32 |") == 4
    assert "### qwen2.5-7b, batch 8" in (tmp_path / "H100" / "predicted.md").read_text()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("--readers no/such-folder", "no/such-folder"),
        ("--readers llama-tiny --encoder nothing", "nothing"),
        ("--readers llama-tiny --data no.json", "--data no.json: there is no such file"),
        ("--readers llama-tiny --half-on-cpu --device cpu", "needs a CUDA device"),
        ("--predict --readers no/such-folder", "no/such-folder"),
    ],
)
def test_what_is_not_there_is_one_line(
    wrong: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prefill_latency.main(wrong.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("prefill_latency: error: ")
    assert message in error
    assert error.count("\n") <= 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert prefill_latency.main(["--device", "cuda:1"]) == 2
    assert "--device cuda:1: torch sees no CUDA device" in capsys.readouterr().err


def test_an_attention_that_is_not_there_leaves_nothing_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--readers llama-tiny --encoder llama-tiny --device cpu --attention best --out"
    assert prefill_latency.main([*options.split(), str(tmp_path)]) == 1
    assert "not measured: llama-tiny: ValueError" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "gpu"),
    [("NVIDIA H200", "H200"), ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H100 PCIe", None),
     ("NVIDIA H100 NVL", None), ("NVIDIA GH200 480GB", None), ("CPU", None)],
)  # fmt: skip
def test_predictions_are_for_the_parts_that_they_were_made_for(name: str, gpu: str | None) -> None:
    assert reachable(name) == (gpu and REACHABLE[gpu])


@pytest.mark.parametrize(
    "wrong",
    [
        *("--latents 0", "--bits 5", "--data x --predict", "--nothing", "--repeats 0"),
        *("--gpus B200", "--warm-ups -1", "--d-z 0"),
    ],
)
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
        mine = top in ("bench", "latentwire_fast")
        if top not in allowed and not mine:
            found.add(top)
    return original(name, globals, locals, fromlist, level)

builtins.__import__ = watched
sys.argv = ["prefill_latency.py", *sys.argv[1:]]
try:
    runpy.run_path("bench/prefill_latency.py", run_name="__main__")
except SystemExit as ending:
    assert not ending.code, ending.code
print("IMPORTED", *sorted(found))
"""
# What torch (jinja2) and transformers require counts with them.
BARE = {
    "torch",
    "jinja2",
    "transformers",
    "huggingface_hub",
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
            "PYTHONPATH": ".",
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
    def latency(section: Any, folder: Path, limit: float, commit: str | None) -> str:
        (folder / section.name).mkdir(exist_ok=True)
        (folder / section.name / "results.json").write_text(f"{commit}")
        return outcome(section)

    monkeypatch.setattr(gpu_prefill, "tests", lambda folder, limit: gpu_prefill.OK)
    monkeypatch.setattr(gpu_prefill, "build_extension", lambda log, limit: "not built: no cmake")
    monkeypatch.setattr(gpu_prefill, "decoding", lambda folder, limit: gpu_prefill.OK)
    monkeypatch.setattr(gpu_prefill, "latency", latency)
    return gpu_prefill.run_all(
        folder, gpu_prefill.SECTIONS, seconds=seconds, tiny=False, commit="1234567"
    )


def test_sections_fit_nine_minutes_and_their_options_parse() -> None:
    whole = gpu_prefill.EXTENSION_SECONDS + gpu_prefill.TESTS_SECONDS
    whole += gpu_prefill.DECODING_SECONDS + sum(s.seconds for s in gpu_prefill.SECTIONS)
    assert whole <= gpu_prefill.TOTAL_SECONDS < 540
    for section in gpu_prefill.SECTIONS:
        prefill_latency.parse(section.options.split())
    prefill_latency.parse(gpu_prefill.TINY.split())


def test_a_relative_folder_is_the_callers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sections run in the root of the checkout; their tables go where the caller said."""
    monkeypatch.chdir(tmp_path)
    commands: list[list[Any]] = []

    def start(command: list[Any], log: Path | None = None) -> None:
        commands.append(command)

    monkeypatch.setattr(gpu_prefill, "start", start)
    monkeypatch.setattr(gpu_prefill, "finish", lambda process, by: gpu_prefill.OK)
    section = gpu_prefill.Section("tables", 60, gpu_prefill.TINY)
    gpu_prefill.run_all(Path("out"), [section], seconds=500, tiny=True)
    (command,) = commands
    assert command[command.index("--out") + 1] == str(tmp_path / "out" / "tables")
    assert (tmp_path / "out" / "sections.txt").exists()


def test_a_section_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def outcome(section: Any) -> str:
        return "failed: status 1" if section.name == "compile" else gpu_prefill.OK

    assert run_sections(tmp_path, monkeypatch, outcome, seconds=500) == 1
    lines = (tmp_path / "sections.txt").read_text().splitlines()
    assert lines == [
        "extension: not built: no cmake",
        "tests: done",
        "tables: done",
        "two_devices: done",
        "decoding: done",
        "compile: failed: status 1",
    ]
    assert run_sections(tmp_path, monkeypatch, lambda section: gpu_prefill.OK, seconds=500) == 0
    assert run_sections(tmp_path, monkeypatch, lambda section: gpu_prefill.OK, seconds=1) == 1
    assert "not run: out of time" in (tmp_path / "sections.txt").read_text()


def test_all_that_is_found_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine may hand back only a few files of a run."""
    for _ in range(2):
        run_sections(tmp_path, monkeypatch, lambda section: gpu_prefill.OK, seconds=500)
    with tarfile.open(tmp_path / "all.tar.gz") as tar:
        names = tar.getnames()
        found = tar.extractfile("tables/results.json")
        assert found is not None
        assert found.read() == b"1234567"
    assert {"sections.txt", "compile/results.json", "two_devices/results.json"} <= set(names)
    assert not any("tar" in name for name in names)


@pytest.mark.parametrize("seconds", [30.0, 300.0])
def test_a_section_is_told_when_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """As a point in time: what it takes to start counts."""
    started: list[Any] = []
    monkeypatch.setattr(gpu_prefill, "start", lambda command: started.append(command))
    monkeypatch.setattr(gpu_prefill, "finish", lambda process, by: str(by))
    before = time.monotonic()
    by = float(gpu_prefill.latency(gpu_prefill.SECTIONS[0], tmp_path, seconds, "1234567"))
    assert before + seconds <= by <= time.monotonic() + seconds
    args = prefill_latency.parse(started[0][2:])
    assert (args.until, args.commit) == (by - gpu_prefill.MARGIN_SECONDS, "1234567")
