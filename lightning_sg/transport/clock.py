"""Seconds in which this process ran: what another is given to answer in."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class RunningClock:
    """A clock that does not count the time in which this process was stopped.

    A process that was stopped (Ctrl-Z, a debugger, a frozen container) finds that nothing was heard of its neighbours
    meanwhile. They were not silent: it did not listen. Between two readings the clock therefore counts ``longest``
    seconds at most. Who waits must read it at least as often as that, or the clock falls behind, and the wait is
    longer.

    Args:
        longest: How many seconds between two readings count at most.
        time: The clock below, in seconds.
    """

    def __init__(self, longest: float, time: Callable[[], float] = time.monotonic) -> None:
        self._longest = longest
        self._time = time
        self._lock = threading.Lock()
        self._read = time()
        self._counted = 0.0

    def now(self) -> float:
        """Seconds since the clock was made; to be read from any thread."""
        with self._lock:
            time = self._time()
            self._counted += min(time - self._read, self._longest)
            self._read = time
            return self._counted


__all__ = ["RunningClock"]
