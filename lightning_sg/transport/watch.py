"""What a process tells its neighbours while it works and waits, and what ends a wait."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from lightning_sg.transport.away import Away
from lightning_sg.transport.clock import RunningClock


def _nothing() -> None:
    """By default nothing but the neighbour ends a wait."""


@dataclass
class Watch:
    """One for each process.

    Attributes:
        timeout: How many seconds the process waits for a neighbour.
        doing: What it is doing, for messages.
        waits: Whether it is waiting for a neighbour.
        away: How long a neighbour may be silent; ``None`` for not at all.
        returning: Whether the process was started anew and has not caught up yet.
        check: Called from time to time in every wait; ends it by raising.
    """

    timeout: float
    doing: str = "start-up"
    waits: bool = False
    away: Away | None = None
    returning: bool = False
    check: Callable[[], None] = _nothing

    @property
    def takes_snapshots(self) -> bool:
        """Whether a new process may take the place of one that is gone."""
        return self.away is not None and self.away.folder is not None

    @property
    def interval(self) -> float:
        """After how many seconds without a message a process says that it runs."""
        shortest = min(1.0, self.timeout / 8)
        return shortest if self.away is None else min(shortest, self.away.patience / 4)

    @cached_property
    def clock(self) -> RunningClock:
        """What waits are measured by; made at the first use."""
        return RunningClock(self.interval)


__all__ = ["Watch"]
