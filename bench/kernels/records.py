"""Records of one row of a case: tables, targets and files are made of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from bench.kernels.clocks import Timing

Errors = dict[str, float]


@dataclass(frozen=True)
class Record:
    """One row's figures, or why there are none; what tables and files are made of.

    Times in seconds, memory in bytes. `against_ours` is the row's median time over ours, from the
    same interleaved rounds.
    """

    kernel: str
    name: str
    shape: tuple[int, ...]
    row: str
    device: str
    traffic: float
    flops: float
    floor: float
    absent: str | None = None
    errors: Errors = field(default_factory=dict)
    timing: Timing | None = None
    against_ours: float | None = None
    peak_bytes: int | None = None
    launches: int | None = None

    @property
    def share_of_floor(self) -> float | None:
        return self.floor / self.timing.p50 if self.timing else None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "share_of_floor": self.share_of_floor}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Record:
        known = {k: v for k, v in entry.items() if k in cls.__dataclass_fields__}
        timing = known["timing"] and Timing(**known["timing"])
        return cls(**{**known, "shape": tuple(known["shape"]), "timing": timing})


def describe(record: Record) -> str:
    """One line of progress."""
    head = f"{record.kernel} {record.name} {record.shape} {record.row}:"
    if record.timing is None:
        return f"{head} {record.absent or 'not timed'}"
    ratio = f", {record.against_ours:.2f}x ours" if record.against_ours else ""
    return f"{head} {1e6 * record.timing.p50:.1f} us{ratio}"
