"""Ceilings of the hardware, and the floor that they set: measured, or from a datasheet."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Stage:
    """Work that is done by launches which overlap: what it moves and computes, at the least.

    Attributes:
        traffic: bytes read and written, each counted once.
        flops: floating-point operations on the matrix units.
        launches: kernels that it takes.
        link: bytes from the host to the device.
    """

    traffic: float
    flops: float = 0.0
    launches: int = 1
    link: float = 0.0


@dataclass(frozen=True)
class Ceilings:
    """Rates that no kernel exceeds.

    Attributes:
        name: of the hardware.
        bytes_per_second: device to device, reads and writes both counted.
        flops_per_second: bf16 matmul with fp32 accumulation.
        launch_seconds: one kernel that does nothing, in a replayed graph.
        link_bytes_per_second: pinned host memory to the device.
        l2_bytes: of the last cache level.
    """

    name: str
    bytes_per_second: float
    flops_per_second: float
    launch_seconds: float
    link_bytes_per_second: float
    l2_bytes: int

    def floor(self, stage: Stage) -> float:
        """Seconds below which no implementation of the stage comes."""
        return max(
            stage.traffic / self.bytes_per_second,
            stage.flops / self.flops_per_second,
            stage.launches * self.launch_seconds,
            stage.link / self.link_bytes_per_second,
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


# Vendor's figures of the SXM parts, dense bf16; launches and links as seen elsewhere.
DATASHEETS = {
    "H100": Ceilings("H100 SXM, datasheet", 3.35e12, 989e12, 2e-6, 64e9, 50 * 2**20),
    "H200": Ceilings("H200 SXM, datasheet", 4.8e12, 989e12, 2e-6, 64e9, 50 * 2**20),
}
# What a large copy and a large matmul reach on these parts, which is what a prediction goes by.
REACHABLE = {
    "H100": Ceilings("H100 SXM, reachable", 2.9e12, 790e12, 2.5e-6, 55e9, 50 * 2**20),
    "H200": Ceilings("H200 SXM, reachable", 4.3e12, 790e12, 2.5e-6, 55e9, 50 * 2**20),
}

# What torch calls these parts. Their PCIe and NVL versions, and GH200, are others.
_SXM = {"NVIDIA H100 80GB HBM3": "H100", "NVIDIA H200": "H200"}


def reachable(device: str) -> Ceilings | None:
    """The reachable rates of a device by its name; None where none are known."""
    return REACHABLE[_SXM[device]] if device in _SXM else None


def best_seconds(call: Callable[[], object], *, repeats: int = 10, device: str = "cpu") -> float:
    """Seconds of the fastest of some calls after a warm-up."""
    for _ in range(3):
        call()
    if device == "cpu":
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
        return min(times)
    marks = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        marks.append((start, end))
    torch.cuda.synchronize()
    return min(start.elapsed_time(end) for start, end in marks) / 1e3


def _launch_seconds(device: str) -> float:
    """Seconds of a kernel on one element: within a replayed graph, or called on a CPU."""
    one = torch.zeros(1, device=device)
    if device == "cpu":
        return best_seconds(lambda: one.add_(1), repeats=100, device=device)
    count = 1000
    with torch.cuda.stream(torch.cuda.Stream()):
        one.add_(1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            one.add_(1)
    return best_seconds(graph.replay, repeats=20, device=device) / count


def measure_ceilings(device: str) -> Ceilings:
    """The ceilings of the GPU, or on a CPU of something small that stands in for them."""
    on_gpu = device != "cpu"
    size, side = (2**30, 8192) if on_gpu else (2**20, 64)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = best_seconds(lambda: target.copy_(source), repeats=20, device=device)
    # Random numbers: a matmul of zeros draws less power and runs faster.
    square = torch.randn(side, side, device=device).to(torch.bfloat16)
    product = torch.empty_like(square)
    matmul = best_seconds(lambda: torch.mm(square, square, out=product), repeats=20, device=device)
    host = torch.ones(size // 4, dtype=torch.uint8, pin_memory=on_gpu)
    part = target[: size // 4]
    link = best_seconds(lambda: part.copy_(host, non_blocking=True), repeats=5, device=device)
    properties = torch.cuda.get_device_properties(device) if on_gpu else None
    return Ceilings(
        name=properties.name if properties else "CPU, small shapes: says nothing of the kernels",
        bytes_per_second=2 * size / copy,
        flops_per_second=2 * side**3 / matmul,
        launch_seconds=_launch_seconds(device),
        link_bytes_per_second=size / 4 / link,
        l2_bytes=properties.L2_cache_size if properties else 2**20,
    )
