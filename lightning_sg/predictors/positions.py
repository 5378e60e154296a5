"""Sequences whose loss is over fewer positions than the activations have, or over others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_sg.predictors.resize import resize

#: Where a sequence becomes another one, one output of a head gives all outputs of a sample at most up to this number.
#: Beyond, as of an encoder before a decoder with thousands of tokens to choose from, there is one for each position.
MOST_OUTPUTS_OF_A_SAMPLE = 512


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


def resampled(rows: Tensor, length: int) -> Tensor:
    """A sequence of another length, each position from those at the same share of the way.

    Args:
        rows: ``(N, T, D)``.
        length: The number of positions T'.

    Returns:
        ``(N, T', D)``: averages where there are fewer positions, else interpolated ones.
    """
    if rows.shape[1] == length:
        return rows
    return resize(rows.transpose(1, 2).unsqueeze(2), (1, length)).squeeze(2).transpose(1, 2)


__all__ = ["MOST_OUTPUTS_OF_A_SAMPLE", "Crop", "resampled"]
