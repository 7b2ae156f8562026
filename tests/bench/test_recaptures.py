"""A stream of requests of many sizes hardly ever waits for a capture."""

from __future__ import annotations

import pytest

from bench.prefill import recaptures


@pytest.mark.parametrize(("most_rows", "old"), [(8, 0.50), (32, 0.875)])
def test_few_requests_wait_for_a_capture(
    most_rows: int, old: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recaptures, "REQUESTS", 5_000)
    rate, _ = recaptures.recapture_rate(most_rows, old=True)
    assert rate == pytest.approx(old, abs=0.02)
    rate, kept = recaptures.recapture_rate(most_rows)
    assert rate < 0.01
    assert kept.bytes < recaptures.FREE / 4


def test_too_little_memory_shows() -> None:
    rate, kept = recaptures.recapture_rate(32, free=1 << 30)
    assert rate > 0.5
    assert kept.bytes <= 1 << 28
