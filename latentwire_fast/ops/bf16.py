"""Whether a device is fast at bfloat16."""

from __future__ import annotations

import time
from functools import cache

import torch

# An emulating CPU takes 10 to 40 times as long as in fp32, one with instructions for it 0.3 to 1.
LIMIT = 2.0


@cache
def is_fast_at_bf16(device_type: str) -> bool:
    """Whether bfloat16 products are worth using on this kind of device.

    A GPU says so. A CPU is measured, once per process and in a few milliseconds: which of its
    instructions torch's libraries use is nowhere to be asked.
    """
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type != "cpu":
        return True
    x, y = torch.ones(64, 512), torch.ones(512, 512)
    return _seconds(x.bfloat16(), y.bfloat16()) < LIMIT * _seconds(x, y)


def _seconds(x: torch.Tensor, y: torch.Tensor) -> float:
    """The shortest of some products."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        x @ y
        times.append(time.perf_counter() - start)
    return min(times)
