"""Calls that block in C++, without keeping this process from answering signals."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")
_SLICE = 0.2  # seconds between two looks


def interruptible(call: Callable[[], Result], check: Callable[[], None] = lambda: None) -> Result:
    """Calls in a thread of its own and waits for it in slices, between which Python handles signals.

    Args:
        call: What may block.
        check: Called between two slices; ends the wait by raising, and leaves the thread to itself.

    Returns:
        What the call returned; what it raised, is raised here.
    """
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append((call(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, name="lightning_sg blocking call", daemon=True)
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


__all__ = ["interruptible"]
