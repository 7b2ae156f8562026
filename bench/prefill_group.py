"""The rows of one reader and batch: made, checked, and measured side by side."""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Iterator
from typing import Any

import torch
from ceilings import Ceilings
from prefill_cases import Bench, Case, build_case
from prefill_clock import Timed, interleave, warm_up
from prefill_results import Result, for_text, result_of
from prefill_rows import Plan, Row, Sizes
from prefill_shapes import Dims, config_of, synthetic_workload, text_prompts, workload_from_file
from torch import Tensor

# A gate compares logits with the eager path's; random readers in half precision differ by this.
GATE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}


class Group:
    """The rows of one reader and batch, measured side by side.

    Args:
        seconds: that it may take; None for as long as it needs.
    """

    def __init__(self, bench: Bench, plan: Plan, args: argparse.Namespace, *, batch: int) -> None:
        self.bench, self.args, self.batch = bench, args, batch
        builder = bench.reader.prompts
        if args.data:
            work = workload_from_file(builder, args.data, rows=batch)
            self.workloads = {work.tokens: work}
        else:
            self.workloads = {
                tokens: synthetic_workload(builder, rows=batch, tokens=tokens, seed=tokens)
                for tokens in plan.text_tokens
            }
        self.plan = Plan(**{**plan.__dict__, "text_tokens": tuple(self.workloads)})
        self.dims = Dims.of(bench.reader.model.config)
        first = next(iter(self.workloads.values()))
        longest = max(len(prompt.ids) for prompt in text_prompts(builder, first))
        encoder = Dims.of(config_of(args.encoder))
        element = bench.dtype.itemsize
        template = longest - first.tokens
        self.sizes = Sizes(self.dims, encoder, args.d_z, template, element, bench.adapter)
        rows = self.plan.rows(args.name, batch, self.dims, element=element)
        # Cheap ones first: what a time limit cuts off is then little.
        self.rows = sorted(rows, key=lambda row: self.sizes.work(row).flops)

    def measure(
        self,
        *,
        ceilings: Ceilings | None,
        rates: Ceilings | None,
        absent: list[Any],
        seconds: float | None,
    ) -> list[Result]:
        """Results of all rows; what could not be measured is told in `absent`."""
        deadline = None if seconds is None else time.monotonic() + seconds
        each = None if seconds is None else 0.7 * seconds / len(self.rows)
        built: list[tuple[Case, Timed, int | None]] = []
        expected: dict[Row, Tensor] = {}
        for row in self.rows:
            if deadline is not None and time.monotonic() > deadline - 0.5 * (seconds or 0):
                absent.append([str(row), "out of time"])
                continue
            try:
                case, peak = self._ready(row, expected)
            except Exception as error:  # a row that fails costs itself alone
                absent.append([str(row), f"{type(error).__name__}: {error}"])
                release(self.bench.device)
                continue
            timed = Timed(case.run)
            warm_up(timed, runs=self.args.warm_ups, seconds=each)
            built.append((case, timed, peak))
        runs = interleave(
            [timed for _, timed, _ in built],
            repeats=self.args.repeats,
            seconds=each,
            deadline=deadline,
        )
        title = f"{self.args.name}, batch {self.batch}"
        for _ in progress(runs, total=len(built) * self.args.repeats, title=title):
            pass
        results = []
        for case, timed, peak in built:
            if not timed.samples:
                absent.append([str(case.row), "out of time"])
                continue
            result = result_of(
                *(case.row, self.sizes),
                ceilings=ceilings,
                rates=rates,
                samples=timed.samples,
                payload_bytes=case.payload_bytes,
                peak_bytes=peak,
            )
            for tokens in [case.row.text_tokens] if case.row.text_tokens else self.workloads:
                results.append(for_text(result, tokens, self.workloads[tokens].text_bytes))
        return results

    def _ready(self, row: Row, expected: dict[Row, Tensor]) -> tuple[Case, int | None]:
        """A case that passed its gate, and the peak of memory in making and running it once."""
        on_gpu = self.bench.device != "cpu"
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        workload = self.workloads.get(row.text_tokens) or next(iter(self.workloads.values()))
        case = build_case(self.bench, row, workload)
        logits = case.logits().float().cpu()
        expected.setdefault(row, logits)
        if (same := case.reference) is not None:
            if same not in expected:
                expected[same] = build_case(self.bench, same, workload).logits().float().cpu()
            check_gate(logits, expected[same], self.args.dtype)
        if not on_gpu:
            return case, None
        torch.cuda.synchronize()
        weights = self.bench.reader.model.get_memory_footprint()
        return case, torch.cuda.max_memory_allocated() - before + weights


def release(device: str) -> None:
    """Give memory back: graphs of rows that are gone hold theirs until it is asked for."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def check_gate(found: Tensor, expected: Tensor, dtype: str) -> None:
    """Raise unless logits are the eager path's, as a share of the largest of them."""
    error = float((found - expected).abs().max() / expected.abs().max())
    if not error <= GATE[dtype]:
        raise AssertionError(f"the gate: logits off by {error:.1e}, allowed {GATE[dtype]:.0e}")


def progress(runs: Iterator[int], *, total: int, title: str) -> Iterator[int]:
    """The runs, with a bar where tqdm is installed and somebody watches."""
    try:
        from tqdm import tqdm
    except ImportError:
        return runs
    return iter(tqdm(runs, total=total, desc=title, disable=None, leave=False))
