"""What code in the last stage gets when it reads a value of a tensor that has none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

# The constant that each read returns, whatever the value would be: it only has to let the step go on.
_CONSTANTS: dict[Callable[..., Any], Any] = {
    Tensor.item: 1.0,
    Tensor.__float__: 1.0,
    Tensor.__int__: 1,
    Tensor.__bool__: True,
}


class Answers:
    """Answers the reads of one traced step: a number is 1 and a condition is true, unless it is to be false.

    Code reads conditions to check what it computes, and raises where a check fails. Some ask whether all is well,
    others whether something is wrong. So a step that fails is followed again with :meth:`others`.

    Args:
        conditions: The first answers to conditions.
    """

    def __init__(self, conditions: Sequence[bool] = ()) -> None:
        self._given = list(conditions)
        self._made: list[bool] = []

    @staticmethod
    def is_read(operation: Callable[..., Any]) -> bool:
        """Whether an operation reads a value, as a number or as a condition."""
        return operation in _CONSTANTS

    def to(self, operation: Callable[..., Any], known: bool | None) -> Any:
        """The answer to a read.

        Args:
            operation: What reads, such as ``Tensor.item``.
            known: The answer if the tensor's history tells it.
        """
        constant = _CONSTANTS[operation]
        if known is not None:
            return type(constant)(known)
        return self.to_condition() if constant is True else constant

    def to_condition(self) -> bool:
        """The answer to the next condition that nothing is known about."""
        place = len(self._made)
        self._made.append(self._given[place] if place < len(self._given) else True)
        return self._made[-1]

    def others(self) -> Answers | None:
        """The same, but for the last condition that was taken for true; ``None`` if there was none."""
        if True not in self._made:
            return None
        last = len(self._made) - 1 - self._made[::-1].index(True)
        return Answers([*self._made[:last], False])


__all__ = ["Answers"]
