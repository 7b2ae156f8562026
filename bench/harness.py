"""What the kernels' benchmarks share: a gate on correctness, a timing, and what to compare it with.

On a GPU each row gets the percentiles of `triton.testing.do_bench` (L2 flushed between calls), the
traffic and arithmetic it stands for as a share of this GPU's own measured ceilings, and its peak
memory. On a CPU the same code runs at small shapes, which tests the harness and says nothing about
the kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def shapes(gpu: list[Any], cpu: list[Any]) -> list[Any]:
    """The real shapes on a GPU, small ones elsewhere."""
    return gpu if DEVICE == "cuda" else cpu


def _milliseconds(call: Callable[[], object]) -> list[float]:
    """20th, 50th and 80th percentile of a call's time on the GPU."""
    from triton.testing import do_bench

    return do_bench(call, quantiles=[0.2, 0.5, 0.8])


@cache
def ceilings() -> dict[str, float]:
    """Bytes/s of a device-to-device copy (read + write), FLOP/s of an 8192-cubed bf16 matmul."""
    source = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    square = torch.randn(8192, 8192, dtype=torch.bfloat16, device=DEVICE)
    copy, matmul = (
        _milliseconds(lambda: target.copy_(source))[1] / 1e3,
        _milliseconds(lambda: square @ square)[1] / 1e3,
    )
    return {"bytes": 2 * 2**30 / copy, "flops": 2 * 8192**3 / matmul}


def worst(found: Tensor, truth: Tensor) -> float:
    """The largest error, as a share of the largest true value."""
    scale = truth.abs().max().clamp(min=1e-30)
    return ((found.double() - truth.double()).abs().max() / scale).item()


def measure(
    benchmark: Any,
    call: Callable[[], object],
    *,
    error: float,
    allowed: float,
    traffic: float,
    flops: float = 0.0,
) -> None:
    """Time `call`, once its result is known to be right.

    Args:
        error: of this row's result against fp64; allowed: the gate.
        traffic: bytes that the operation cannot do without; flops: likewise.
    """
    assert error <= allowed, f"the gate: error {error:.2e} over {allowed:.2e}"
    benchmark.extra_info.update(device=DEVICE, error=error, bytes=traffic, flops=flops)
    if DEVICE == "cpu":
        benchmark.pedantic(call, rounds=3, warmup_rounds=1)
        return
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    times = _milliseconds(call)
    floor = max(traffic / ceilings()["bytes"], flops / ceilings()["flops"])
    benchmark.extra_info.update(
        milliseconds=times,
        bytes_per_second=traffic / times[1] * 1e3,
        flops_per_second=flops / times[1] * 1e3,
        share_of_floor=floor / (times[1] / 1e3),
        peak_bytes=peak,
        gpu=torch.cuda.get_device_name(),
        torch=torch.__version__,
    )

    def timed() -> None:
        call()
        torch.cuda.synchronize()

    benchmark.pedantic(timed, rounds=5, warmup_rounds=1)
