"""Numbers of `metrics.json` as they are printed, in one place for HTML and Markdown.

A value is a number, `{"mean", "low", "high"}`, or missing; what is missing prints as a dash.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

MISSING, TIMES = "\N{EM DASH}", "\N{MULTIPLICATION SIGN}"


class Measured(NamedTuple):
    """A value with the bounds of its interval, where it has one."""

    mean: float
    low: float | None = None
    high: float | None = None


class Cell(NamedTuple):
    """A table cell: the value, its interval in small print, and for shares the same in percent."""

    text: str
    interval: str = ""
    percent: Measured | None = None


def measured(value: Any) -> Measured | None:
    """A number or an interval record as `Measured`; None when it was not measured."""
    if isinstance(value, Mapping):
        if value.get("mean") is None:
            return None
        return Measured(value["mean"], value.get("low"), value.get("high"))
    return None if value is None else Measured(float(value))


def mean(value: Any) -> float | None:
    """The mean of `measured`."""
    found = measured(value)
    return None if found is None else found.mean


def cell(value: Any, *, digits: int = 1, scale: float = 1.0, signed: bool = False) -> Cell:
    """A value times `scale` with so many decimals."""
    found = measured(value)
    if found is None:
        return Cell(MISSING)
    numbers = [None if part is None else part * scale for part in found]
    texts = [None if n is None else number(n, digits=digits, signed=signed) for n in numbers]
    interval = f"{texts[1]} to {texts[2]}" if texts[1] and texts[2] else ""
    return Cell(str(texts[0]), interval)


def percent(value: Any) -> Cell:
    """A share of 1 in percent."""
    found = measured(value)
    if found is None:
        return Cell(MISSING)
    low, high = (None if bound is None else 100 * bound for bound in found[1:])
    return cell(value, scale=100)._replace(percent=Measured(100 * found.mean, low, high))


def number(value: float, *, digits: int = 1, signed: bool = False) -> str:
    """A number with thousands separators and a true minus sign; zero has no sign."""
    rounded = round(value, digits) + 0.0
    text = f"{rounded:{'+' if signed and rounded else ''},.{digits}f}"
    return text.replace("-", "\N{MINUS SIGN}")


def size(value: Any) -> str:
    """Bytes without decimals."""
    found = mean(value)
    return MISSING if found is None else number(found, digits=0)


def ratio(top: Any, bottom: Any, *, digits: int = 2) -> str:
    """`top / bottom` with a times sign."""
    upper, lower = mean(top), mean(bottom)
    return (
        MISSING if upper is None or not lower else f"{number(upper / lower, digits=digits)}{TIMES}"
    )
