"""Payloads that were mutated and given the correct CRC again (W4); `fuzz_wire.py` makes them.

`make fuzz` goes on with new ones for a minute: 200,000 and more where nothing else runs.
"""

from __future__ import annotations

import fuzz_wire
import pytest


@pytest.mark.parametrize(
    ("count", "seed"), [(10_000, 0), pytest.param(100_000, 1, marks=pytest.mark.slow)]
)
def test_mutated_payloads_are_refused_or_canonical(count: int, seed: int) -> None:
    counts = fuzz_wire.fuzz(seed, lambda counts: counts.tried < count)
    assert counts.tried == count
    # The mutations reach everything: each kind of refusal, and much that is valid.
    assert set(counts.refused) == set(fuzz_wire.REFUSALS)
    assert counts.accepted > count / 10
    assert counts.refused["not the one its codes ask for"] > count / 20


def test_a_failure_names_its_payload(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(payload: bytes) -> None:
        raise IndexError

    monkeypatch.setattr(fuzz_wire.wire, "unpack", crash)
    with pytest.raises(AssertionError, match=r"IndexError for 4c57"):
        fuzz_wire.fuzz(0, lambda _: True)


def test_a_payload_that_is_not_canonical_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    payload = fuzz_wire.corpus()[-1]
    wrong = fuzz_wire.repaired(payload[:-2] + b"\x00\x3c")
    result = fuzz_wire.wire.unpack(payload)
    monkeypatch.setattr(fuzz_wire.wire, "unpack", lambda _: result)
    with pytest.raises(AssertionError, match="is accepted, but its latent packs to"):
        fuzz_wire.check(wrong)
