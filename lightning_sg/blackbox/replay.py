"""Keeps recent rows of activation, value, context and score, since scores can be dear."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_sg._compat import tree_flatten, tree_unflatten
from lightning_sg.blackbox.estimator import Example


class Replay:
    """The newest rows that a boundary has scores of, in a ring.

    Args:
        capacity: How many rows to keep.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._columns: list[Tensor] = []
        self._structure: Any = None
        self._spread = torch.zeros(())
        self._next = 0
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, example: Example) -> None:
        """Adds rows; the oldest make room.

        Raises:
            ValueError: If the rows are not of the shapes of those before.
        """
        columns, structure = tree_flatten(example.of_samples())
        columns = [column[-self.capacity :] for column in columns]
        rows = columns[0].shape[0]
        if not self._columns:
            self._columns = [column.new_empty(self.capacity, *column.shape[1:]) for column in columns]
            self._structure = structure
        if structure != self._structure or any(a.shape[1:] != b.shape[1:] for a, b in zip(columns, self._columns)):
            raise ValueError(
                f"rows of shapes {[tuple(column.shape[1:]) for column in columns]} follow rows of shapes "
                f"{[tuple(column.shape[1:]) for column in self._columns]}; only the number of samples may change"
            )
        places = (torch.arange(rows, device=columns[0].device) + self._next) % self.capacity
        for kept, column in zip(self._columns, columns):
            kept[places] = column
        self._spread = example.spread
        self._next = (self._next + rows) % self.capacity
        self._count = min(self.capacity, self._count + rows)

    def sample(self, rows: int, generator: torch.Generator) -> Example:
        """Draws rows with replacement.

        Args:
            rows: How many.
            generator: Of random numbers, on the rows' device.
        """
        # By age, so that a replay that was saved and restored, and begins anew in its ring, draws the same rows.
        age = torch.randint(self._count, (rows,), generator=generator, device=self._columns[0].device)
        places = (self._next - 1 - age) % self.capacity
        activation, value, context, score = tree_unflatten(
            [column[places] for column in self._columns], self._structure
        )
        return Example(activation, value, self._spread, context, score)

    def rows(self) -> Example | None:
        """All rows, the oldest first; ``None`` if there are none."""
        if not self._count:
            return None
        order = (torch.arange(self._count, device=self._columns[0].device) + self._next - self._count) % self.capacity
        activation, value, context, score = tree_unflatten([column[order] for column in self._columns], self._structure)
        return Example(activation, value, self._spread, context, score)


__all__ = ["Replay"]
