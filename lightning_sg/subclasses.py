"""Tensors of a class of the user's own, which this package handles as the plain tensors that they are.

Such a class may override methods (``clone``, ``reshape``) and rely on attributes that results of operations lack. Fake
tensors do not mix with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_sg._compat import DisableTorchFunctionSubclass, FakeTensor, tree_leaves, tree_map_only

_DISPATCH = Tensor.__torch_dispatch__


def of_own_class(value: object) -> bool:
    """Whether ``value`` is a tensor of a Python class over an ordinary tensor, other than torch's own parameters."""
    kind = type(value)
    if kind is Tensor or not isinstance(value, Tensor) or isinstance(value, (nn.Parameter, nn.Buffer)):
        return False
    return getattr(kind, "__torch_dispatch__", None) is _DISPATCH


def plain_tensor(tensor: Tensor) -> Tensor:
    """``tensor`` without its class: the same data, through which gradients flow; itself if it is plain already."""
    if not of_own_class(tensor):
        return tensor
    with DisableTorchFunctionSubclass():
        return tensor.as_subclass(Tensor)


def copy_of_tensor(tensor: Tensor) -> Tensor:
    """A copy, made by the tensor's class so that it has what the class adds."""
    return tensor.clone() if of_own_class(tensor) else torch.clone(tensor)


def call_beside_fakes(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Calls an operation of torch. If an argument is a fake tensor, all are made plain, and the result is plain."""
    if not any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs))):
        return func(*args, **kwargs)
    args, kwargs = tree_map_only(Tensor, plain_tensor, (args, kwargs))
    return func(*args, **kwargs)


@contextmanager
def fakes_stay_plain() -> Iterator[None]:
    """Makes ``fake.as_subclass(Own)`` the fake tensor itself, which can be of no other class."""
    if "as_subclass" in vars(FakeTensor):  # in an outer context
        yield
        return
    FakeTensor.as_subclass = _itself  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del FakeTensor.as_subclass


def _itself(tensor: Tensor, _kind: type[Tensor]) -> Tensor:
    return tensor


@contextmanager
def plain_beside_fakes(batch: Any) -> Iterator[None]:
    """Lets a step run on fake parameters although ``batch`` has tensors of an own class."""
    if any(of_own_class(leaf) for leaf in tree_leaves(batch)):
        with fakes_stay_plain(), _PlainBesideFakes():
            yield
    else:
        yield


def refuses_a_mode(error: Exception) -> bool:
    """Whether torch refused to make a tensor of an own class, ``Own(tensor)``, because a dispatch mode is active."""
    return isinstance(error, RuntimeError) and str(error).startswith("Creating a new Tensor subclass")


class _PlainBesideFakes(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return call_beside_fakes(func, args, kwargs or {})


__all__ = [
    "call_beside_fakes",
    "copy_of_tensor",
    "fakes_stay_plain",
    "of_own_class",
    "plain_beside_fakes",
    "plain_tensor",
    "refuses_a_mode",
]
