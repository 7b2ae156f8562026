"""The rows of one reader and batch: made, checked, and measured side by side."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench.kernels.ceilings import Ceilings
from bench.prefill.cases import Bench, Case, build_case
from bench.prefill.clock import Sample
from bench.prefill.results import Result, for_text, result_of
from bench.prefill.rows import Plan, Row, Sizes
from bench.prefill.schedule import Effort, Timed, measure_rows
from bench.prefill.shapes import (
    config_of,
    synthetic_workload,
    text_prompts,
    workload_from_file,
)
from latentwire_fast import ops
from latentwire_fast.readers.shapes import Dims

# How far logits may be from the reference's, as a share of their norm. Random readers in half
# precision differ by 0.05 to 0.07 between two attention kernels over 32 layers.
GATE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 8e-2}


class Group:
    """The rows of one reader and batch, measured side by side.

    Args:
        expected: logits that rows must have, known before; the others are computed when a row needs
            them, by the eager engine with the reference of every kernel.
    """

    def __init__(
        self,
        bench: Bench,
        plan: Plan,
        args: argparse.Namespace,
        *,
        batch: int,
        expected: Mapping[Row, Tensor] | None = None,
    ) -> None:
        self.bench, self.args, self.batch = bench, args, batch
        builder = bench.reader.prompts
        if args.data:
            work = workload_from_file(builder, args.data, rows=batch)
            self.workloads = {work.tokens: work}
        else:
            self.workloads = {
                tokens: synthetic_workload(builder, rows=batch, tokens=tokens, seed=tokens)
                for tokens in plan.lengths(batch) or plan.text_tokens[:1]
            }
        self.plan = replace(plan, text_tokens=tuple(self.workloads))
        self.dims = Dims.of(bench.reader.model.config)
        first = next(iter(self.workloads.values()))
        longest = max(len(prompt.ids) for prompt in text_prompts(builder, first))
        encoder = Dims.of(config_of(args.encoder))
        element = bench.dtype.itemsize
        template = longest - first.tokens
        self.sizes = Sizes(self.dims, encoder, args.d_z, template, element, bench.adapter)
        self.rows = list(self.plan.rows(args.name, batch, self.dims, element=element))
        self._expected = dict(expected or {})
        # By row: payload bytes, peak of memory, and how far the logits were from the reference.
        self._facts: dict[Row, tuple[int | None, int | None, float]] = {}

    def measure(
        self,
        rows: Sequence[Row],
        *,
        ceilings: Ceilings | None,
        rates: Ceilings | None,
        machine: dict[str, Any],
        effort: Effort,
    ) -> list[Result]:
        """Results of these rows. What could not be measured is told in the machine's `absent`, how
        far the others were from their reference in its `gates`."""
        found = measure_rows(
            rows,
            self._ready,
            effort=effort,
            release=lambda: release(self.bench.device),
            watch=lambda runs, total: progress(
                runs, total=total, title=f"{self.args.name}, batch {self.batch}"
            ),
        )
        results = []
        for timed in found:
            if timed.failure is not None:
                machine["absent"].append([timed.row.title, timed.failure])
                continue
            machine["gates"].append([timed.row.title, self._facts[timed.row][2]])
            results += self._results(timed, ceilings=ceilings, rates=rates)
        return results

    def _results(
        self, timed: Timed[Row], *, ceilings: Ceilings | None, rates: Ceilings | None
    ) -> list[Result]:
        """The row's, once for each text that it stands for."""
        row = timed.row
        payload_bytes, peak, _ = self._facts[row]
        result = result_of(
            *(row, self.sizes),
            ceilings=ceilings,
            rates=rates,
            samples=timed.samples,
            payload_bytes=payload_bytes,
            peak_bytes=peak,
        )
        lengths = [row.text_tokens] if row.text_tokens else list(self.workloads)
        return [for_text(result, n, self.workloads[n].text_bytes) for n in lengths]

    def compile_kernels(self) -> None:
        """Read a payload of each kind, so that the first row need not wait for a compiler."""
        rows = {row.method: replace(row, engine="eager") for row in self.rows if row.latents}
        for row in rows.values():
            build_case(self.bench, row, self._workload(row)).logits()

    def logits(self) -> dict[Row, Tensor]:
        """Logits of the eager rows, which are not timed here: other processes compare with them."""
        eager = (row for row in self.rows if row.engine == "eager" and row.method != "kv_reuse")
        return {row: self._reference(row, None) for row in eager}

    def _ready(self, row: Row) -> Callable[[], Sample]:
        """The call that runs the row, once it has passed its gate."""
        on_gpu = self.bench.device != "cpu"
        before = torch.cuda.memory_allocated() if on_gpu else 0
        case = build_case(self.bench, row, self._workload(row))
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        logits = case.logits().float().cpu()
        peak = None
        if on_gpu:
            torch.cuda.synchronize()
            weights = self.bench.reader.model.get_memory_footprint()
            peak = torch.cuda.max_memory_allocated() - before + weights
        same = case.reference or row
        if same == row and row.method == "text":
            self._expected.setdefault(row, logits)  # no kernel of ours is in it
        if same not in self._expected:
            self._expected[same] = self._reference(same, case if same == row else None)
        error = check_gate(logits, self._expected[same], self.args.dtype)
        self._facts[row] = (case.payload_bytes, peak, error)
        return case.run

    def _reference(self, row: Row, case: Case | None) -> Tensor:
        """Logits of an eager row with every kernel's reference in its place."""
        case = case or build_case(self.bench, row, self._workload(row))
        with ops.backend("reference"):
            return case.logits().float().cpu()

    def _workload(self, row: Row) -> Any:
        return self.workloads.get(row.text_tokens) or next(iter(self.workloads.values()))


def release(device: str) -> None:
    """Give memory back: graphs of rows that are gone hold theirs until it is asked for."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def check_gate(found: Tensor, expected: Tensor, dtype: str) -> float:
    """Distance of logits `[B, V]` from the reference's: the worst row's, over its norm.

    Raises:
        AssertionError: too far.
    """
    error = float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())
    if not error <= GATE[dtype]:
        raise AssertionError(f"the gate: logits off by {error:.1e}, allowed {GATE[dtype]:.0e}")
    return error


def progress(runs: Iterator[int], *, total: int, title: str) -> Iterator[int]:
    """The runs, with a bar where tqdm is installed and somebody watches."""
    try:
        from tqdm import tqdm
    except ImportError:
        return runs
    return iter(tqdm(runs, total=total, desc=title, disable=None, leave=False))
