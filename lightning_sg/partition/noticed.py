"""Notices whether a step goes by anything that differs from batch to batch, besides what tensors compute."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import nn


class Noticed:
    """What a step has been seen to go by.

    Attributes:
        anything: Whether it has gone by a number that was given to it, by what it counts itself, or by chance.

    Args:
        module: The LightningModule.
    """

    def __init__(self, module: nn.Module) -> None:
        self.anything = False
        self._module = module
        self._before = self._state()

    def number(self, value: int = 0) -> int:
        """A number that is noticed when it is used for anything but to be added to another."""
        return _Number(value, self._note)

    def look(self) -> None:
        """The step is over: looks at what it has changed."""
        if self._state() != self._before:
            self.anything = True

    def _note(self) -> None:
        self.anything = True

    def _state(self) -> Any:
        counts = {name: value for name, value in vars(self._module).items() if type(value) in (bool, int, float)}
        kind, keys, *place = np.random.get_state()
        return counts, random.getstate(), (kind, bytes(keys), place)  # type: ignore[arg-type]


class _Number(int):
    """A number that tells of its use."""

    _note: Callable[[], None]

    def __new__(cls, value: int, note: Callable[[], None]) -> _Number:
        """Makes it."""
        made = super().__new__(cls, value)
        made._note = note
        return made

    def __radd__(self, other: Any) -> Any:
        """The sum, which tells of its use as well."""
        total = int.__add__(other, self)
        return total if total is NotImplemented else _Number(total, self._note)

    __hash__ = int.__hash__


def _telling(name: str) -> Callable[..., Any]:
    method = getattr(int, name)

    def tell(self: _Number, *args: Any) -> Any:
        self._note()
        return method(self, *args)

    return tell


_USES = (
    *("add", "sub", "rsub", "mul", "rmul", "mod", "rmod", "divmod", "rdivmod", "floordiv", "rfloordiv", "truediv"),
    *("rtruediv", "pow", "rpow", "and", "rand", "or", "ror", "xor", "rxor", "lshift", "rlshift", "rshift", "rrshift"),
    *("neg", "abs", "eq", "ne", "lt", "le", "gt", "ge", "bool", "index", "int", "float"),
)
for _use in _USES:
    setattr(_Number, f"__{_use}__", _telling(f"__{_use}__"))

__all__ = ["Noticed"]
