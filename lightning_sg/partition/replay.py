"""An iterator whose items can be taken again: a traced step takes from it what the real step takes once more."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from io import IOBase
from typing import Any

from lightning_sg.batch.copying import copy_of


class Replayed(Iterator[Any]):
    """Stands for an iterator, hands out copies of its items, and keeps the items until :meth:`rewind`.

    Args:
        source: The iterator.
    """

    def __init__(self, source: Iterator[Any]) -> None:
        self._source = source
        self._again: deque[Any] = deque()
        self._taken: list[Any] | None = []

    @staticmethod
    def can_stand_for(value: Any) -> bool:
        """Whether a value is an iterator over items, rather than a file."""
        return isinstance(value, Iterator) and not isinstance(value, IOBase)

    @property
    def used(self) -> bool:
        """Whether an item has been taken, so that the iterator itself has gone on."""
        return bool(self._taken or self._again)

    def rewind(self) -> None:
        """Begins anew with the first item; from now on every item is handed out as it is, and once."""
        self._again.extend(self._taken or [])
        self._taken = None

    def __next__(self) -> Any:
        if self._again:
            return self._again.popleft()
        item = next(self._source)
        if self._taken is None:
            return item
        self._taken.append(item)
        return copy_of(item)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_source" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._source, name)


__all__ = ["Replayed"]
