"""The batches under way at one place, and when each is due."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Generic, TypeVar

Entry = TypeVar("Entry")

#: The due date of what comes at a time of its own.
NEVER = sys.maxsize


class Ledger(Generic[Entry]):
    """Entries by the step and crossing that they were made at, each with a step at which it is due.

    The due dates are fixed when an entry is made, so that what is learned, and in which order, does not depend on where
    the stages run.

    Example::

        >>> ledger = Ledger[str]()
        >>> ledger.add(0, "first", due=2)
        >>> ledger.add(1, "second", due=2)
        >>> ledger.due(1), ledger.due(2), len(ledger)
        ([], ['first', 'second'], 0)
    """

    def __init__(self) -> None:
        self._entries: dict[tuple[int, int], tuple[int, Entry]] = {}

    def add(self, step: int, entry: Entry, due: int, crossing: int = 0) -> None:
        """Enters what was made at ``step``, in its crossing of that number, and is due before ``due``."""
        self._entries[step, crossing] = (due, entry)

    def due(self, now: int) -> list[Entry]:
        """Takes out all that is due before step ``now``, in the order of due dates, steps and crossings."""
        ready = sorted((due, place) for place, (due, _entry) in self._entries.items() if due <= now)
        return [self._entries.pop(place)[1] for _due, place in ready]

    def drop(self, step: int, crossing: int = 0) -> None:
        """Takes out the entry of a crossing, if there is one."""
        self._entries.pop((step, crossing), None)

    def clear(self) -> None:
        """Takes out everything."""
        self._entries.clear()

    def steps(self) -> list[int]:
        """The steps of the entries, in the order in which they were made."""
        return [step for step, _crossing in self._entries]

    def __getitem__(self, step: int) -> Entry:
        return self._entries[step, 0][1]

    def __contains__(self, step: int) -> bool:
        return (step, 0) in self._entries

    def __iter__(self) -> Iterator[Entry]:
        """The entries in the order in which they were made."""
        return iter([entry for _due, entry in self._entries.values()])

    def __len__(self) -> int:
        return len(self._entries)


__all__ = ["NEVER", "Ledger"]
