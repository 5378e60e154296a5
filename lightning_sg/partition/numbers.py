"""Numbers of a traced step that know how they were computed: sizes of tensors, and what Python makes of them.

A step that writes ``y.view(len_, -1)`` for ``len_ = x.shape[0]`` is to be repeated on a batch of another size. So while
a step is traced, sizes are integers that remember from which tensor they come.
"""

from __future__ import annotations

import builtins
import operator
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from lightning_sg.batch.program import Operation, Value
from lightning_sg.partition.shadow import shadowed


class Number:
    """What :class:`Integer` and :class:`Decimal` share.

    Attributes:
        value: How the number was computed; ``None`` if nobody needs to know any more.
    """

    value: Value | None = None


class Integer(int, Number):
    """A whole number that remembers how it was computed."""

    __hash__ = int.__hash__


class Decimal(float, Number):
    """A fraction that remembers how it was computed."""

    __hash__ = float.__hash__


def number(result: Any, value: Value | None) -> Any:
    """A number that remembers how it was computed; booleans and everything else come back as they are."""
    if value is None or isinstance(result, bool):
        return result
    made: Integer | Decimal
    if isinstance(result, int):
        made = Integer(result)
    elif isinstance(result, float):
        made = Decimal(result)
    else:
        return result
    made.value = value
    return made


_len = len


def lengths_of_tensors() -> AbstractContextManager[None]:
    """While entered, ``len(x)`` of a tensor is ``x.shape[0]``; Python would make it a plain integer."""
    return shadowed([(builtins, "len", _length)])


def _length(of: Any, /) -> int:
    if isinstance(of, Tensor) and type(of).__len__ is Tensor.__len__ and of.ndim:
        return of.shape[0]
    return _len(of)


def _remembering(compute: Callable[..., Any], plain: Callable[..., Any], *, swapped: bool) -> Callable[..., Any]:
    def method(self: Any, *others: Any) -> Any:
        result = plain(self, *others)
        if result is NotImplemented and isinstance(self, int) and others and isinstance(others[0], float):
            own, other = int(self), float(others[0])
            result = compute(other, own) if swapped else compute(own, other)
        if result is NotImplemented or self.value is None:
            return result
        known = [other.value if isinstance(other, Number) and other.value is not None else other for other in others]
        args = (*known, self.value) if swapped else (self.value, *known)
        return number(result, Value(_operation(compute, args)))

    return method


def _operation(compute: Callable[..., Any], args: tuple[Any, ...]) -> Operation:
    values = [each for each in args if isinstance(each, Value)]
    return Operation(
        network=any(each.node.network for each in values),
        batch=any(each.node.batch for each in values),
        obstacle=next((each.node.obstacle for each in values if each.node.obstacle), ""),
        sized=any(each.node.batch for each in values) and all(each.node.sized for each in values if each.node.batch),
        function=compute,
        args=args,
        size=True,
    )


for _kind, _base in ((Integer, int), (Decimal, float)):
    for _name in ("add", "sub", "mul", "floordiv", "mod", "truediv", "pow"):
        _function = getattr(operator, _name)
        setattr(_kind, f"__{_name}__", _remembering(_function, getattr(_base, f"__{_name}__"), swapped=False))
        setattr(_kind, f"__r{_name}__", _remembering(_function, getattr(_base, f"__r{_name}__"), swapped=True))
    for _name in ("neg", "abs"):
        setattr(
            _kind,
            f"__{_name}__",
            _remembering(getattr(operator, _name), getattr(_base, f"__{_name}__"), swapped=False),
        )


__all__ = ["Decimal", "Integer", "Number", "lengths_of_tensors", "number"]
