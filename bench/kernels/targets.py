"""Targets of the kernels, and what a run's records say of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from bench.kernels.ceilings import Ceilings
from bench.kernels.harness import AUTOTUNED
from bench.kernels.records import Record

Figure = Callable[[Record, Record], float | None]


@dataclass(frozen=True)
class Target:
    """A bound on the worst figure of some cases.

    Attributes:
        kernel: K1 to K4; name: pattern of the cases' names; what: the figure, in words.
        bound: least value, or with `at_most` the largest.
        row: whose record is looked at, beside ours of the same case.
        figure: of that record and ours; None where it was not measured.
        shapes: which shapes count; all by default.
    """

    kernel: str
    name: str
    what: str
    bound: float
    row: str
    figure: Figure
    shapes: Callable[[tuple[int, ...]], bool] = lambda shape: True
    at_most: bool = False

    def verdict(self, records: Iterable[Record]) -> dict[str, Any]:
        """The worst value, of how many cases, and whether it is met; None: not measured.

        A result of ours that is wrong meets nothing.
        """
        found = {
            (r.name, r.shape, r.row): r
            for r in records
            if r.kernel == self.kernel and fnmatch(r.name, self.name) and self.shapes(r.shape)
        }
        figures = []
        for (name, shape, row), record in found.items():
            ours = found.get((name, shape, "ours"))
            if row == self.row and ours is not None:
                figures.append(self.figure(record, ours))
        values = [value for value in figures if value is not None]
        worst = (max if self.at_most else min)(values) if values else None
        met = None
        if any(r.row == "ours" and r.absent for r in found.values()):
            met = False
        elif worst is not None:
            met = worst <= self.bound if self.at_most else worst >= self.bound
        return {
            "kernel": self.kernel,
            "what": self.what,
            "target": f"{'<=' if self.at_most else '>='} {self.bound:g}",
            "value": worst,
            "cases": len(values),
            "unmeasured_cases": len(figures) - len(values),
            "met": met,
        }


def ratio(record: Record, ours: Record) -> float | None:
    return record.against_ours


def share(record: Record, ours: Record) -> float | None:
    return record.share_of_floor


def memory(record: Record, ours: Record) -> float | None:
    """Our peak over the row's."""
    if not record.peak_bytes or ours.peak_bytes is None:
        return None
    return ours.peak_bytes / record.peak_bytes


def started(record: Record, ours: Record) -> float | None:
    return record.launches


def of_bandwidth(ceilings: Ceilings, *, times: float = 1.0) -> Figure:
    """Share of the copy bandwidth of so many times the traffic, whatever else bounds the case."""

    def figure(record: Record, ours: Record) -> float | None:
        if record.timing is None:
            return None
        return times * record.traffic / record.timing.p50 / ceilings.bytes_per_second

    return figure


def of_matmul(ceilings: Ceilings) -> Figure:
    """Share of the matmul ceiling."""

    def figure(record: Record, ours: Record) -> float | None:
        if record.timing is None:
            return None
        return record.flops / record.timing.p50 / ceilings.flops_per_second

    return figure


def targets(ceilings: Ceilings) -> list[Target]:
    """All targets, in the order of the kernels."""

    def large(shape: tuple[int, ...]) -> bool:
        return shape[0] * shape[1] * 2 >= 256 * 2**20

    def paper(shape: tuple[int, ...]) -> bool:
        return not large(shape)

    bandwidth, matmul = of_bandwidth(ceilings), of_matmul(ceilings)
    # The work counts one read of both logits and one write; the row is walked twice.
    two_reads = of_bandwidth(ceilings, times=5 / 3)
    forward, both = "project*, forward", "project*backward"
    tanh, payload = "tanh*, forward", "from a payload*"
    logits, head = "KL of logits*backward", "KL through*backward"
    labels, pair = "cross-entropy through*", "both losses through*"
    return [
        Target("K1", "*", "share of copy bandwidth, 256 MB", 0.85, "ours", bandwidth, large),
        Target("K1", "*", "launches, paper size", 1, "ours", started, paper, at_most=True),
        Target("K1", "*", "times faster than eager, paper size", 5, "eager", ratio, paper),
        Target("K1", "*", "times faster than max-autotune, paper size", 1, AUTOTUNED, ratio, paper),
        Target("K1", "*", "times faster than compile, paper size", 1, "compile", ratio, paper),
        Target(
            *("K2", forward, "share of copy bandwidth, N 16384", 0.75, "ours", bandwidth),
            shapes=lambda shape: shape[0] >= 16384,
        ),
        Target("K2", forward, "times faster than eager, forward", 3, "eager", ratio),
        Target("K2", forward, "times faster than torch.compile, forward", 1.2, "compile", ratio),
        Target("K2", both, "times faster than eager, forward+backward", 1.5, "eager", ratio),
        Target("K2", payload, "from a payload: times faster than eager", 3, "eager", ratio),
        Target("K2", payload, "from a payload: times faster than compile", 1.2, "compile", ratio),
        Target("K2", tanh, "with tanh: times faster than eager, forward", 3, "eager", ratio),
        Target("K2", tanh, "with tanh: times faster than compile", 1.2, "compile", ratio),
        Target("K2", "tanh*backward", "with tanh: times faster than eager", 1.5, "eager", ratio),
        Target("K3", logits, "on logits: share of the floor of two reads", 0.80, "ours", two_reads),
        Target("K3", logits, "on logits: times faster than Liger", 2, "liger", ratio),
        Target("K3", logits, "on logits: times faster than eager", 3, "eager", ratio),
        Target("K3", head, "through the head: share of the matmul floor", 0.65, "ours", matmul),
        Target(
            *("K3", head, "through the head: peak memory over eager's, N 4096", 1 / 8, "eager"),
            *(memory, lambda shape: shape[0] == 4096),
            at_most=True,
        ),
        Target("K3", head, "through the head: times faster than Liger", 1.5, "liger", ratio),
        Target("K3", head, "through the head: times faster than eager", 1.5, "eager", ratio),
        Target("K3", labels, "cross-entropy: share of the matmul floor", 0.65, "ours", matmul),
        Target("K3", labels, "cross-entropy: times faster than Liger", 1.3, "liger", ratio),
        Target("K3", labels, "cross-entropy: times faster than compile", 1.2, "compile", ratio),
        Target(
            *("K3", labels, "cross-entropy: peak memory over eager's, N 4096", 1 / 8, "eager"),
            *(memory, lambda shape: shape[0] == 4096),
            at_most=True,
        ),
        Target("K3", pair, "both losses: times faster than Liger's two", 1.3, "liger", ratio),
        Target("K3", pair, "both losses: times faster than compile", 1.2, "compile", ratio),
        Target(
            *("K3", pair, "both losses: peak memory over eager's", 1 / 8, "eager", memory),
            at_most=True,
        ),
        Target("K4", "*", "copies started on the device", 2, "ours", started, at_most=True),
        Target("K4", "*", "times faster than the loop over layers", 5, "eager", ratio),
        Target("K4", "prefix, host*", "share of the link's bandwidth", 0.8, "ours", share),
    ]
