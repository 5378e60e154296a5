"""A wait for another process ends when this one is asked to."""

from __future__ import annotations

import time

from lightning_sg.lightning_api import SIGTERMException, pl

_PATIENCE = 3.0  # seconds in which the others may bring this process to the end of its batch


class EndedBySignal:
    """Called from time to time in a wait: raises a while after SIGTERM, which Lightning only notes until then.

    Args:
        trainer: Knows whether SIGTERM has come.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self._since: float | None = None

    def __call__(self) -> None:
        """Looks for the signal.

        Raises:
            SIGTERMException: If it came some seconds ago.
        """
        if not self._trainer.received_sigterm:
            return
        self._since = self._since or time.monotonic()
        if time.monotonic() - self._since >= _PATIENCE:
            raise SIGTERMException


__all__ = ["EndedBySignal"]
