"""Schedules: what a number is at every step of a run or of a stage."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from latentwire_fast.errors import ConfigError
from latentwire_fast.registry import SCHEDULES
from latentwire_fast.schedules.base import build_schedule


def values(kind: str, total: int, **settings: Any) -> list[float]:
    """The values of a schedule for each of `total` steps."""
    schedule = build_schedule(SCHEDULES.config(kind, **settings))
    return [schedule.value(step, total) for step in range(total)]


def test_every_schedule_of_the_table_has_defaults() -> None:
    for kind in SCHEDULES.names():
        assert all(value >= 0 for value in values(kind, 7)), kind


def test_a_constant_stays() -> None:
    assert values("constant", 3) == [1.0] * 3
    assert values("constant", 3, level=0.25) == [0.25] * 3


def test_warm_up_then_flat_then_half_a_cosine_to_zero() -> None:
    found = values("warmup_cosine", 100, warmup_steps=10, decay_from=0.3)
    assert found[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert found[10:31] == [1.0] * 21
    assert found[65] == pytest.approx(0.5), "half way down"
    assert found[99] == pytest.approx(0.0, abs=1e-3)
    assert all(a >= b for a, b in itertools.pairwise(found[30:]))


def test_neither_warm_up_nor_decay() -> None:
    assert values("warmup_cosine", 100, warmup_steps=0, decay_from=1.0) == [1.0] * 100


def test_steps_change_at_their_shares() -> None:
    levels = ((0.2, 1), (0.5, 2), (1.0, 4))
    found = values("steps", 100, levels=levels)
    assert found == [1] * 20 + [2] * 30 + [4] * 50
    schedule = build_schedule(SCHEDULES.config("steps", levels=levels))
    assert schedule.value(100, 100) == 4, "the last level also stands for what comes after"
    assert values("steps", 10, levels=((0.5, 3),)) == [3] * 10


def test_a_ramp_lies_between_its_shares() -> None:
    found = values("linear", 100, start=2.0, end=1.0, from_share=0.2, until_share=0.6)
    assert found[:21] == [2.0] * 21
    assert found[40] == pytest.approx(1.5)
    assert found[60:] == [1.0] * 40
    smooth = values("cosine", 100, start=2.0, end=1.0, from_share=0.2, until_share=0.6)
    assert smooth[40] == pytest.approx(1.5)
    assert smooth[30] > found[30]
    assert smooth[60:] == [1.0] * 40


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("linear", {"start": -1.0}, "start=-1.0, expected at least 0"),
        ("cosine", {"from_share": 0.5, "until_share": 0.5}, "the first one smaller"),
        ("gated", {"gate": 0.0}, "gate=0.0, expected above 0"),
        ("gated", {"rise": 0}, "rise=0, expected at least 1"),
    ],
)
def test_bad_settings_are_named(kind: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SCHEDULES.config(kind, **settings)


def test_a_gated_number_goes_on_and_back() -> None:
    gated = SCHEDULES["gated"](
        SCHEDULES.config("gated", gate=0.5, start=1.0, end=5.0, rise=4, back_off=2.0)
    )
    progress, found = 0.0, []
    for accuracy in (0.4, 0.5, 0.6, 0.9, 0.4, 0.6, 0.6, 0.6, 0.6):
        progress = gated.advance(progress, accuracy)
        found.append(gated.at(progress))
    assert found == [1.0, 2.0, 3.0, 4.0, 2.0, 3.0, 4.0, 5.0, 5.0]
