"""Learns from the store of the run which processes have failed."""

from __future__ import annotations

import threading
import time
from functools import partial
from types import TracebackType

from lightning_sg.transport.interruptible import BlockingThread
from lightning_sg.transport.roll_call import RunStore

_SLICE = 0.1  # seconds between two questions


class News:
    """While entered, asks the store for failures, in a thread: the store's host may be stopped.

    Attributes:
        failed: The reasons of processes that have failed, by rank.
        store_gone: Whether the store is gone, which rank 0 keeps.
        silent: For how many seconds the store has kept this process waiting for an answer.

    Args:
        run: The store of the run; ``None`` for nobody to ask.
    """

    def __init__(self, run: RunStore | None) -> None:
        self.failed: dict[int, str] = {}
        self.store_gone = False
        self._run = run
        self._closed = threading.Event()
        self._asked: float | None = None

    @property
    def silent(self) -> float:
        """See :class:`News`."""
        asked = self._asked
        return 0.0 if asked is None else time.monotonic() - asked

    def __enter__(self) -> News:
        if self._run is not None:
            BlockingThread(partial(self._ask, self._run), "news", self._run.hang_up).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()

    def _ask(self, run: RunStore) -> None:
        while not self._closed.is_set():
            self._asked = time.monotonic()
            self.failed = run.failed()
            self.store_gone = not self.failed and not run.answers()
            self._asked = None
            self._closed.wait(_SLICE)


__all__ = ["News"]
