"""K4 against the loop over layers that peft and transformers use: a prefix into a reader's cache.

pytest bench/placement/bench_placement.py --benchmark-only
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache

from bench.kernels.ceilings import Stage
from bench.kernels.clocks import Call, Inputs
from bench.kernels.harness import DEVICE, Absent, Case, Row, grid, report_row
from bench.kernels.records import Errors
from bench.placement import placement as rows
from latentwire_fast.readers import kv_placement
from latentwire_fast.readers.arriving_layer import settle
from latentwire_fast.readers.kv_cache import CacheFiller

# Where the prefix comes from.
HOST, DEVICE_FP32 = "host to device", "on the device, fp32 to bf16"


def make_case(name: str, placed: rows.Case, *, gpu: bool) -> Case:
    """One placement of a prefix for `placed.batch` examples, timed as its caller waits for it."""
    device = "cuda:0" if gpu else "cpu"
    shape = (rows.LAYERS, 2, placed.rows, rows.HEADS, rows.POSITIONS, rows.WIDTH)
    values = torch.Size(shape).numel()

    def inputs() -> Inputs:
        prefix = torch.randn(shape).to(placed.prefix_dtype)
        if not gpu:
            return (prefix,)
        return (prefix.pin_memory() if name == HOST else prefix.to(device),)

    def loop(inputs: Inputs) -> Cache:
        return rows.loop_over_layers(inputs[0], placed, device)

    def ours() -> Call:
        if not kv_placement.has_extension():
            raise Absent("the C++ extension is not built")
        filler = CacheFiller(
            [device] * rows.LAYERS,
            dtype=placed.cache_dtype,
            heads=rows.HEADS,
            head_width=rows.WIDTH,
        )

        def fill(inputs: Inputs) -> Cache:
            cache = DynamicCache()
            filler.fill(cache, prefix_L2BHPD=inputs[0], batch_size=placed.batch, stable=True)
            settle(cache)  # what is measured ends when the prefix is there
            return cache

        return fill

    def different(found: Cache, inputs: Inputs, truth: Cache) -> Errors:
        pairs = [
            (getattr(mine, part), getattr(theirs, part))
            for mine, theirs in zip(found.layers, truth.layers, strict=True)
            for part in ("keys", "values")
        ]
        return {"values": float(not all(torch.equal(mine, theirs) for mine, theirs in pairs))}

    if name == HOST:
        stage = Stage(0.0, link=values * placed.cache_dtype.itemsize)
    else:
        stage = Stage(values * (placed.prefix_dtype.itemsize + placed.cache_dtype.itemsize))
    return Case(
        *("K4", f"prefix, {name}", (rows.LAYERS, placed.batch, rows.HEADS, rows.POSITIONS)),
        dtype=placed.cache_dtype,
        work=stage,
        design=(stage,),
        inputs=inputs,
        truth=loop,
        errors=different,
        rows={
            "ours": Row(ours, {"values": 0.0}),
            "eager": Row(lambda: loop, {"values": 0.0}),
        },
        wall=True,
    )


def cases(*, gpu: bool = DEVICE == "cuda") -> list[Case]:
    """From the host in the cache's dtype, and from the device with a cast."""
    fp32, bf16 = torch.float32, torch.bfloat16
    if not gpu:
        return [make_case(DEVICE_FP32, rows.Case(1, 1, fp32, bf16), gpu=False)]
    return [
        make_case(HOST, rows.Case(1, 1, bf16, bf16), gpu=True),
        make_case(DEVICE_FP32, rows.Case(1, 1, fp32, bf16), gpu=True),
        make_case(DEVICE_FP32, rows.Case(1, 8, fp32, bf16), gpu=True),
    ]


@pytest.mark.parametrize(**grid(cases()))
def test_placement(benchmark: Any, case: Case, row: str) -> None:
    report_row(benchmark, case, row)
