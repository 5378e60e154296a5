"""Operations that change a tensor in place, as operations that return a changed copy."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor

from lightning_sg._compat import tree_leaves
from lightning_sg.batch.program import Operation, Value


class OnCopy:
    """An operation that works in place, on a copy of its first argument.

    Args:
        function: The operation.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.__name__ = getattr(function, "__name__", "")

    def __call__(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the changed copy."""
        changed = tensor.clone()
        result = self._function(changed, *args, **kwargs)
        return result if isinstance(result, Tensor) else changed


class OnView:
    """An operation that works in place on a view of a tensor, on a copy of that tensor.

    Args:
        function: The operation.
        views: The operations that take the view, one after the other.
    """

    def __init__(self, function: Callable[..., Any], views: Sequence[Callable[..., Any]]) -> None:
        self._function = function
        self._views = list(views)
        self.__name__ = f"{getattr(function, '__name__', '').strip('_')} of a view"

    def __call__(self, tensor: Tensor, taken: Sequence[Any], *args: Any, **kwargs: Any) -> Tensor:
        """Returns the changed copy of the whole tensor.

        Args:
            tensor: The tensor.
            taken: For each view its other arguments, its keyword arguments, and which of its results it is.
            args: Arguments of the operation after the view.
            kwargs: Its keyword arguments.
        """
        changed = tensor.clone()
        part = changed
        for view, (others, named, place) in zip(self._views, taken):
            part = view(part, *others, **named)
            part = part if place is None else tree_leaves(part)[place]
        self._function(part, *args, **kwargs)
        return changed


#: An operation that returned a view, and which of its results that is; ``None`` if it has only this.
ViewTaken = tuple[Operation, int | None]


def views_of(value: Value, sharing: Collection[Value]) -> tuple[Value, list[ViewTaken]]:
    """The tensor that another is a view of, and what leads from it to the view.

    Args:
        value: The view, or any other tensor, which is its own base.
        sharing: All tensors that share its memory.
    """
    views: list[ViewTaken] = []
    while isinstance(node := value.node, Operation) and not isinstance(node.function, (OnCopy, OnView)):
        before = node.args[0] if node.args else None
        if not isinstance(before, Value) or before not in sharing:
            break
        views.insert(0, (node, value.place))
        value = before
    return value, views


__all__ = ["OnCopy", "OnView", "ViewTaken", "views_of"]
