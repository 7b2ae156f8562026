"""The results, as results.json, samples.csv, Markdown, LaTeX and a figure.

A result is one row for one text length; rows whose time does not depend on the text appear once for
each length that they stand for, with the same samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from bench.kernels.ceilings import Ceilings
from bench.prefill.clock import Sample, percentile
from bench.prefill.rows import ENGINES, METHODS, Row, Sizes

SCHEMA_VERSION = 1
# Share of the samples that a row's phases are taken from.
TYPICAL = 0.2


@dataclass(frozen=True)
class Result:
    """One row of the table.

    Attributes:
        samples: of the row's prefills; none where it was only predicted.
        payload_bytes: of one payload; text_bytes: of one context.
        peak_bytes: of the device's memory, weights included; None on a CPU.
        floor, predicted: milliseconds; predicted None where no GPU's figures apply.
    """

    row: Row
    samples: list[Sample]
    payload_bytes: int | None
    text_bytes: float | None
    positions: int
    kv_bytes: int
    flops: int
    floor: float | None = None
    predicted: float | None = None
    peak_bytes: int | None = None

    @property
    def totals(self) -> list[float]:
        return [sample.total for sample in self.samples]

    @property
    def p50(self) -> float | None:
        return percentile(self.totals, 50) if self.samples else None

    @property
    def milliseconds(self) -> float | None:
        """Measured, or else predicted."""
        return self.p50 if self.samples else self.predicted

    @property
    def p95(self) -> float | None:
        return percentile(self.totals, 95) if self.samples else None

    @property
    def phases(self) -> dict[str, float]:
        """Milliseconds of each phase in a typical run: the mean of the fifth of the samples whose
        totals are nearest to the median. (Medians of each phase for itself need not add up.)"""
        median = self.p50
        if median is None:
            return {}
        nearest = sorted(self.samples, key=lambda sample: abs(sample.total - median))
        typical = nearest[: max(1, round(TYPICAL * len(nearest)))]
        names = typical[0].phases
        return {name: sum(s.phases[name] for s in typical) / len(typical) for name in names}

    @property
    def sum_of_phases(self) -> float:
        """The share of the total that the phases add up to."""
        return sum(self.phases.values()) / (self.p50 or math.nan)


def result_of(
    row: Row,
    sizes: Sizes,
    *,
    ceilings: Ceilings | None,
    rates: Ceilings | None,
    **measured: Any,
) -> Result:
    """A row with its costs, and what was measured if anything was."""
    cost = sizes.cost(row)
    reader = sizes.reader_pass(row)
    return Result(
        row,
        samples=measured.pop("samples", []),
        payload_bytes=measured.pop("payload_bytes", None),
        text_bytes=measured.pop("text_bytes", None),
        positions=reader.new,
        kv_bytes=reader.kv_bytes,
        flops=cost.flops,
        floor=None if ceilings is None else 1e3 * cost.floor(ceilings),
        predicted=None if rates is None else 1e3 * cost.predict(rates, engine=row.engine),
        **measured,
    )


def for_text(result: Result, tokens: int, text_bytes: float | None) -> Result:
    """A result that does not depend on the text, in the place of one text length."""
    return replace(result, row=replace(result.row, text_tokens=tokens), text_bytes=text_bytes)


@dataclass
class Results:
    """Everything so far."""

    machine: dict[str, Any]
    results: list[Result] = field(default_factory=list)

    def speedup(self, result: Result, *, engine: str) -> float | None:
        """The factor over the text in that engine, at the same batch and length."""
        wanted = replace(result.row, method="text", engine=engine, latents=None, bits=None)
        wanted = replace(wanted, encoder=None)
        base = next((other for other in self.results if other.row == wanted), None)
        if base is None or bool(base.samples) != bool(result.samples):
            return None
        times = base.milliseconds, result.milliseconds
        return times[0] / times[1] if times[0] and times[1] else None

    def ordered(self) -> list[Result]:
        """The results in the order of the tables."""
        readers = list(dict.fromkeys(r.row.reader for r in self.results))

        def key(result: Result) -> tuple[Any, ...]:
            row = result.row
            return (
                *(readers.index(row.reader), row.batch, row.text_tokens),
                *(ENGINES.index(row.engine), METHODS.index(row.method)),
                *(row.latents or 0, -(row.bits or 0), row.encoder or ""),
            )

        return sorted(self.results, key=key)

    def to_json(self) -> dict[str, Any]:
        """The content of results.json."""
        rows = [self._entry(result) for result in self.ordered() if result.samples]
        return {"schema_version": SCHEMA_VERSION, "machine": self.machine, "rows": rows}

    def _entry(self, result: Result) -> dict[str, Any]:
        row = result.row
        return {
            "reader": row.reader,
            "method": row.method,
            "engine": row.engine,
            "batch": row.batch,
            "text_tokens": row.text_tokens,
            "M": row.latents,
            "bits": row.bits,
            "positions": result.positions,
            "payload_bytes": result.payload_bytes,
            "text_bytes": result.text_bytes,
            "kv_bytes": result.kv_bytes,
            "flops": result.flops,
            "phases_ms": result.phases,
            "total_ms_p50": result.p50,
            "total_ms_p95": result.p95,
            "speedup_same_engine": self.speedup(result, engine=row.engine),
            "speedup_vs_text_eager": self.speedup(result, engine="eager"),
            "floor_ms": result.floor,
            "share_of_floor": result.floor / result.p50 if result.floor and result.p50 else None,
            "peak_memory_bytes": result.peak_bytes,
        }
