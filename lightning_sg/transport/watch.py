"""What a process tells its neighbours while it works and waits, and what ends a wait."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


def _nothing() -> None:
    """By default nothing but the neighbour ends a wait."""


@dataclass
class Watch:
    """One for each process.

    Attributes:
        timeout: How many seconds the process waits for a neighbour.
        doing: What it is doing, for messages.
        waits: Whether it is waiting for a neighbour.
        check: Called from time to time in every wait; ends it by raising.
    """

    timeout: float
    doing: str = "start-up"
    waits: bool = False
    check: Callable[[], None] = _nothing

    @property
    def interval(self) -> float:
        """After how many seconds without a message a process says that it runs."""
        return min(1.0, self.timeout / 8)


__all__ = ["Watch"]
