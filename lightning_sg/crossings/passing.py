"""What a backward pass does at the boundaries between stages of one process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Protocol

from torch import Tensor


class Passing(Enum):
    """What a backward pass does at the boundary."""

    SYNTHETIC = "stores the target and passes the synthetic gradient on"
    EXACT = "stores the true gradient as the exact target and passes it on"
    RESIDUAL = "stores the residual and passes exact minus used gradient on"


class PassedBackward(Protocol):
    """A crossing of such a boundary.

    Attributes:
        passing: What a backward pass does here.
        carriers: Of a batch with an exact gradient, the tensors that carry one, as they left the stage before.
    """

    passing: Passing
    carriers: list[Tensor]

    def expect_exact(self) -> None:
        """Takes zero for the exact target, as long as no backward pass brings another."""


@contextmanager
def passing(crossings: Sequence[PassedBackward], how: Passing) -> Iterator[None]:
    """Has backward passes do something else at these boundaries for a while."""
    for crossing in crossings:
        crossing.passing = how
    try:
        yield
    finally:
        for crossing in crossings:
            crossing.passing = Passing.SYNTHETIC


__all__ = ["PassedBackward", "Passing", "passing"]
