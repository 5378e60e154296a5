"""Tensors of a class of the user's own, which this package handles as the plain tensors that they are.

Such a class may override methods (``clone``, ``reshape``) that rely on attributes which results of operations lack. And
tensors without data can be of no other class: beside them, and in a traced step, all tensors are plain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_sg._compat import DisableTorchFunctionSubclass, FakeTensor, tree_leaves, tree_map_only

_DISPATCH = Tensor.__torch_dispatch__
_NEW = Tensor.__new__
_AS_SUBCLASS = Tensor.as_subclass


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


def call_beside_fakes(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Calls an operation of torch. If an argument has no data, all are made plain, and so is the result."""
    leaves = tree_leaves((args, kwargs))
    if any(isinstance(leaf, FakeTensor) for leaf in leaves) and any(map(of_own_class, leaves)):
        args, kwargs = tree_map_only(Tensor, plain_tensor, (tuple(args), kwargs))
    return func(*args, **kwargs)


@contextmanager
def plain_beside_fakes(batch: Any) -> Iterator[None]:
    """Lets a step run on parameters without data although ``batch`` has tensors of an own class."""
    if any(map(of_own_class, tree_leaves(batch))):
        with fakes_stay_plain(), _PlainBesideFakes():
            yield
    else:
        yield


@contextmanager
def fakes_stay_plain(made: Callable[[Tensor, Tensor], None] = lambda _tensor, _of: None) -> Iterator[None]:
    """Lets code make tensors of its own classes, ``Own(tensor)`` and ``tensor.as_subclass(Own)``, in a traced step.

    Torch refuses the first where a mode sees every operation, and shows the second to no mode. Both leave a tensor
    without data as it is.

    Args:
        made: Is told of each tensor that is made like this, and of what.
    """
    if "as_subclass" in vars(Tensor):  # in an outer context
        yield
        return

    def as_subclass(tensor: Tensor, kind: type[Tensor]) -> Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        result: Tensor = _AS_SUBCLASS(tensor, kind)
        made(result, tensor)
        return result

    Tensor.as_subclass = as_subclass  # type: ignore[method-assign, assignment]
    Tensor.__new__ = _new  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del Tensor.as_subclass, Tensor.__new__


def _new(kind: type[Tensor], *args: Any, **kwargs: Any) -> Tensor:
    if len(args) == 1 and isinstance(args[0], Tensor) and not kwargs:
        return args[0].as_subclass(kind)
    made: Tensor = _NEW(kind, *args, **kwargs)
    return made


class _PlainBesideFakes(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return call_beside_fakes(func, args, kwargs or {})


__all__ = ["call_beside_fakes", "fakes_stay_plain", "of_own_class", "plain_beside_fakes", "plain_tensor"]
