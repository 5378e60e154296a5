"""Follows which random numbers of a traced step can be drawn again for another batch.

Each stage begins with numbers of its own, see :class:`~lightning_sg.rng.StepRandomness`. What is drawn of them before
the network draws any, such as noise, a mask or the choice of a part of the batch, any process can draw again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from lightning_sg.batch.program import Operation, StageNumbers, Value
from lightning_sg.partition.fake_mode import draws


class Draws:
    """The random numbers of a traced step."""

    def __init__(self) -> None:
        self._stage = 0
        self._last: Value | None = None
        self._begun = False
        self._lost = False
        self._drew = False

    def next_stage(self) -> None:
        """The step has come to another stage, which has other numbers."""
        self._stage += 1
        self._begun = self._lost = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While entered, one operation runs; :meth:`take` is told how it was noted."""
        counter = _Counter()
        with counter:
            yield
        self._drew = counter.drew

    def take(self, operation: Operation, *, own_generator: bool) -> None:
        """Notes of the operation that has just run what it drew, if anything.

        Args:
            operation: The operation.
            own_generator: Whether it drew from a generator that it was given.
        """
        if not self._drew:
            return
        self._drew = False
        operation.sized = False
        if operation.network:
            self._lost = True
            return
        operation.batch = True
        if own_generator:
            operation.obstacle = operation.obstacle or f"it is drawn from a generator of the step's ({operation.name})"
        elif operation.obstacle or self._lost:
            after = ", after numbers that cannot be drawn again, such as those of dropout"
            operation.obstacle = operation.obstacle or f"it is drawn at random ({operation.name}){after}"
            self._lost = True
        else:
            if not self._begun:
                self._last = Value(StageNumbers(stage=self._stage, after=self._last))
                self._begun = True
            operation.after = self._last
            self._last = Value(operation)


class _Counter(TorchDispatchMode):
    """Notices whether anything is drawn while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.drew = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.drew = self.drew or draws(func, args, kwargs)
        return func(*args, **kwargs)


__all__ = ["Draws"]
