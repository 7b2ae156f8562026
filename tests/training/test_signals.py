"""Signals become requests, the second Ctrl-C does not, and handlers are put back."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from latentwire_fast.training.signals import StopSignals

NUMBERS = (signal.SIGINT, signal.SIGTERM)


def send(number: int) -> None:
    """To this process, whose handler runs before the call returns."""
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_is_noted_and_the_handlers_come_back(number: int) -> None:
    before = [signal.getsignal(n) for n in NUMBERS]
    with StopSignals() as signals:
        assert signals.number is None
        send(number)
        assert signals.number == number
    assert [signal.getsignal(n) for n in NUMBERS] == before


@pytest.mark.parametrize("first", NUMBERS)
def test_ctrl_c_after_a_signal_interrupts(first: int) -> None:
    before = signal.getsignal(signal.SIGINT)
    signals = StopSignals()
    with signals:
        send(first)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    assert signals.number == first
    assert signal.getsignal(signal.SIGINT) is before


def test_schedulers_may_repeat_themselves() -> None:
    with StopSignals() as signals:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
            send(number)
    assert signals.number == signal.SIGINT


def test_ctrl_c_works_where_it_was_ignored() -> None:
    """A background job of a script inherits an ignored SIGINT; and it is ignored again after."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            send(signal.SIGINT)
        assert signals.number == signal.SIGINT
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_leave_signals_alone() -> None:
    before = [signal.getsignal(n) for n in NUMBERS]
    seen = []

    def enter() -> None:
        with StopSignals():
            seen.append([signal.getsignal(n) for n in NUMBERS])

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [before]
