"""Answers code that reads values of tensors that have none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_sg._compat import tree_leaves
from lightning_sg.partition.fakes import is_fake

# What a read returns, of the type that the code expects.
_READS: dict[Callable[..., Any], type] = {
    Tensor.item: float,
    Tensor.__float__: float,
    Tensor.__int__: int,
    Tensor.__index__: int,
    Tensor.__bool__: bool,
}
_WHOLE = (Tensor.tolist, Tensor.numpy)
_CHECKS = {"isnan": False, "isinf": False, "isneginf": False, "isposinf": False, "isfinite": True}
_KEEP = ("any", "all", "or", "logical_or", "bitwise_or", "and", "logical_and", "bitwise_and", "bool", "detach", "to")
_TURN = ("logical_not", "bitwise_not", "invert")


class WithoutValues(TorchFunctionMode):
    """Lets code that reads values run on tensors without data: a number is 1, a condition true, and all is finite.

    Attributes:
        read: Whether the step itself has read a value of a tensor with data, such as one of the batch.

    Args:
        active: Whether reads are answered now.
        inside: Whether a submodule runs, whose reads of tensors with data do not count.
        other: What such a read returns in place of the value; ``None`` for the value.
        most: How many reads are answered; code that still reads on is taken to loop until a value changes.
    """

    def __init__(
        self,
        active: Callable[[], bool] = lambda: True,
        inside: Callable[[], bool] = lambda: True,
        other: float | None = None,
        most: int = 10_000,
    ) -> None:
        super().__init__()
        self.read = False
        self._active = active
        self._inside = inside
        self._other = other
        self._most = most

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _READS or func in _WHOLE:
            return self._value(func, args, kwargs)
        result = func(*args, **kwargs)
        if is_fake(result) and self._active():
            expected = _expected(getattr(func, "__name__", "").strip("_"), (args, kwargs))
            if expected is not None:
                result._sg_expected = expected
        return result

    def _value(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        tensor = args[0]
        if not is_fake(tensor):
            if self._inside():
                return func(*args, **kwargs)
            self.read = True
            real = func(*args, **kwargs)
            return real if self._other is None or func in _WHOLE else type(real)(self._other)
        if not self._active():
            return func(*args, **kwargs)
        self._most -= 1
        if self._most < 0:
            raise RuntimeError("the code reads values until they change, which they do not without data")
        if func in _WHOLE:
            values = torch.zeros(tensor.shape, dtype=tensor.dtype)
            return values.tolist() if func is Tensor.tolist else values.numpy()
        return _READS[func](getattr(tensor, "_sg_expected", True))


def _expected(name: str, arguments: Any) -> bool | None:
    """Whether a tensor of booleans is true where all numbers are finite; ``None`` if that does not decide it."""
    if name in _CHECKS:
        return _CHECKS[name]
    if name not in _KEEP and name not in _TURN:
        return None
    known = [getattr(leaf, "_sg_expected", None) for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
    if len(known) != 1 or known[0] is None:
        return None
    return not known[0] if name in _TURN else known[0]


__all__ = ["WithoutValues"]
