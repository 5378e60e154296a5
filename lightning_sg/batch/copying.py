"""Copies a batch of any form, so that a step can be run on it twice."""

from __future__ import annotations

import copy
from collections import deque
from typing import Any

import numpy as np
from torch import Tensor

from lightning_sg.batch.attributes import attributes_of, set_attribute


def copy_of(arguments: Any) -> Any:
    """Copies the tensors, arrays and containers in a step's arguments, and the objects that hold them.

    Objects of any class are copied, frozen ones too. What holds no data, or cannot be copied, stays the same object.
    What is in two places is so in the copy.
    """
    return _Copying().of(arguments)


class _Copying:
    def __init__(self) -> None:
        # By id, with the original, so that no id is given anew meanwhile.
        self._copies: dict[int, tuple[Any, Any]] = {}

    def of(self, value: Any) -> Any:
        if value is None or isinstance(value, (str, bytes, int, float, complex)):
            return value
        known = self._copies.get(id(value))
        return self._note(value, self._made(value)) if known is None else known[1]

    def _note(self, value: Any, made: Any) -> Any:
        self._copies[id(value)] = (value, made)
        return made

    def _made(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.clone()
        if isinstance(value, np.ndarray):
            return value.copy()
        if type(value) in (list, set, deque):
            made = self._note(value, copy.copy(value))
            made.clear()
            (made.update if isinstance(made, set) else made.extend)([self.of(part) for part in value])
            return made
        if type(value) is tuple:
            return tuple(self.of(part) for part in value)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)._make(self.of(part) for part in value)  # type: ignore[attr-defined]
        return self._object(value)

    def _object(self, value: Any) -> Any:
        """A copy of an object of another class."""
        if not (attributes_of(value) or isinstance(value, (dict, list))) or hasattr(type(value), "__del__"):
            return value
        made = _shallow_copy(value)
        if made is value or type(made) is not type(value):
            return value
        self._note(value, made)
        for name, content in attributes_of(made).items():
            set_attribute(made, name, self.of(content))
        if isinstance(made, dict):
            for key, content in list(dict.items(made)):
                dict.__setitem__(made, key, self.of(content))
        elif isinstance(made, list):
            list.__setitem__(made, slice(None), [self.of(part) for part in list.__iter__(made)])
        return made


def _shallow_copy(value: Any) -> Any:
    """A copy by the class's own rules, or the same object if it cannot be copied."""
    try:
        return copy.copy(value)
    except Exception:  # the user's class may forbid it in any way
        if hasattr(type(value), "__copy__"):
            return value
    try:  # a frozen class with slots cannot be copied by Python's rules
        made = object.__new__(type(value))
        for name, content in attributes_of(value).items():
            object.__setattr__(made, name, content)
    except Exception:
        return value
    return made


__all__ = ["copy_of"]
