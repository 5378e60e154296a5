"""Batches of classes of the user's own, as packages for graphs and sets of boxes have them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


class Graph:
    """All that Lightning asks of it is ``to``."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def to(self, *args: Any, **kwargs: Any) -> Graph:
        return Graph(self.x.to(*args, **kwargs), self.y.to(*args, **kwargs))


class Store:
    """Refers back to what holds it."""

    def __init__(self, parent: Any, **tensors: Tensor) -> None:
        self.parent, self.tensors = parent, tensors


class Stored:
    """Keeps its tensors in an object of its own."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self._store = Store(self, x=x, y=y)

    @property
    def x(self) -> Tensor:
        return self._store.tensors["x"]

    @property
    def y(self) -> Tensor:
        return self._store.tensors["y"]

    def to(self, *args: Any, **kwargs: Any) -> Stored:
        return Stored(self.x.to(*args, **kwargs), self.y.to(*args, **kwargs))


class Base:
    __slots__ = ("x",)


class Slotted(Base):
    """Has no ``__dict__``, a private slot, and one that is never filled."""

    __slots__ = ("__y", "unset")

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.__y = x, y

    @property
    def y(self) -> Tensor:
        return self.__y

    def to(self, *args: Any, **kwargs: Any) -> Slotted:
        return Slotted(self.x.to(*args, **kwargs), self.y.to(*args, **kwargs))


@dataclass(frozen=True)
class Frozen:
    """Cannot be changed."""

    x: Tensor
    y: Tensor

    def to(self, *args: Any, **kwargs: Any) -> Frozen:
        return Frozen(self.x.to(*args, **kwargs), self.y.to(*args, **kwargs))


@dataclass(frozen=True)
class FrozenSlots:
    """Cannot be changed, and has no ``__dict__``."""

    __slots__ = ("x", "y")
    x: Tensor
    y: Tensor

    def to(self, *args: Any, **kwargs: Any) -> FrozenSlots:
        return FrozenSlots(self.x.to(*args, **kwargs), self.y.to(*args, **kwargs))


#: Classes that are made of ``x`` and ``y``, have them as attributes, and move by ``to``.
KINDS = (Graph, Stored, Slotted, Frozen, FrozenSlots)
