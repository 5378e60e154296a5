"""Calls that block in C++: signals are answered meanwhile, and Python does not end while one is under way."""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakSet

Result = TypeVar("Result")
_SLICE = 0.2  # seconds between two looks
_LAST = 1.0  # seconds that a call may still take at the end of the process, and once more when it has been woken
_threads: WeakSet[BlockingThread] = WeakSet()


def nothing() -> None:
    """Does nothing."""


class BlockingThread(threading.Thread):
    """A thread whose calls may block in C++ for longer than anybody waits for it.

    A thread that came back from C++ while Python ends would abort the process, and hide the error that ended it. So the
    end of the process waits for these threads, and wakes those that stay.

    Args:
        run: What it does.
        name: Its name.
        wake: Makes the call that blocks return, at the end of the process.
    """

    def __init__(self, run: Callable[[], None], name: str, wake: Callable[[], None] = nothing) -> None:
        super().__init__(target=run, name=f"lightning_sg {name}", daemon=True)
        self.wake = wake
        _threads.add(self)


def interruptible(
    call: Callable[[], Result], check: Callable[[], None] = nothing, wake: Callable[[], None] = nothing
) -> Result:
    """Calls in a thread of its own and waits for it in slices, between which Python handles signals.

    Args:
        call: What may block.
        check: Called between two slices; ends the wait by raising, and leaves the thread to itself.
        wake: See :class:`BlockingThread`.

    Returns:
        What the call returned; what it raised, is raised here.
    """
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append((call(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = BlockingThread(run, "blocking call", wake)
    thread.start()
    while thread.is_alive():
        thread.join(_SLICE)
        if thread.is_alive():
            check()
    result, error = outcome[0]
    if error is not None:
        raise error
    found: Result = result
    return found


@atexit.register
def _wait_for_threads() -> None:
    for thread in _alive_after(_LAST):
        thread.wake()
    _alive_after(_LAST)


def _alive_after(seconds: float) -> list[BlockingThread]:
    """The threads that are still at work after at most so many seconds."""
    deadline = time.monotonic() + seconds
    threads = [thread for thread in _threads if thread.is_alive()]
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return [thread for thread in threads if thread.is_alive()]


__all__ = ["BlockingThread", "interruptible", "nothing"]
