"""SIGINT and SIGTERM as a request that a loop can see: it ends its step, saves, and stops."""

from __future__ import annotations

import contextlib
import signal
from types import FrameType
from typing import Any


class StopSignals:
    """While entered, takes note of SIGINT (Ctrl-C) and SIGTERM (schedulers) instead of dying.

    Once one of them has come, SIGINT interrupts at once: every file that is written holds the old
    or the new content at any instant, so nothing is lost but the steps since the last save. In a
    thread other than the main one nothing is changed: the host program handles its own signals.

    Attributes:
        number: the first signal that came; None before that.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        # Also where SIGINT was ignored from the start, as in a script's background jobs: who sends
        # it to this process means it.
        with contextlib.suppress(ValueError):
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._take_note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take_note(self, number: int, frame: FrameType | None) -> None:
        if self.number is None:
            self.number = number
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
