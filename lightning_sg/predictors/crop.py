"""Positions of a sequence that a model's loss leaves out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Crop:
    """Which positions of a sequence reach the loss: a causal language model drops the last one, for instance.

    Attributes:
        positions: How many the sequence had in the traced step.
        left: How many of them were left.
        start: The first that is kept, as in a slice, for sequences of any length.
        stop: The first after it that is not.
    """

    positions: int
    left: int
    start: int | None = None
    stop: int | None = None

    def of(self, rows: Tensor) -> Tensor:
        """The positions that are left of ``(N, T, ...)``."""
        return rows[:, self.start : self.stop]

    def fits(self, rows: Sequence[int], shape: Sequence[int]) -> bool:
        """Whether it leads from rows ``(N, T, D)`` to the positions of ``(N, T', ...)``, given both shapes."""
        return len(rows) == 3 and rows[1] == self.positions and tuple(shape[:2]) == (rows[0], self.left)


__all__ = ["Crop"]
